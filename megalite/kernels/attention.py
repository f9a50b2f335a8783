"""Attention by name: who computes it, and who does where nobody was named.

All take query [b, A, s, D], key and value [b, K, s, D] and what a query sees, None for all up to itself, and
give [b, A, s, D]; see sight.py.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from megalite.kernels.blocks import attend_in_blocks
from megalite.kernels.sight import Sight

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Sight | None], torch.Tensor]


def attend_by_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sight: Sight | None = None
) -> torch.Tensor:
    """torch's scaled_dot_product_attention: FlashAttention on GPUs, where there is no mask."""
    mask = None if sight is None else sight.mask
    grouped = query.size(1) != key.size(1)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )


def attend_by_flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sight: Sight | None = None
) -> torch.Tensor:
    """torch's FlexAttention (arXiv 2412.05496) where there are documents; compiled for a GPU."""
    if sight is None:
        return attend_by_sdpa(query, key, value)
    attention = _flex_attention(compiled=query.is_cuda)
    return attention(query, key, value, block_mask=sight.flex_mask, enable_gqa=query.size(1) != key.size(1))


def attend_by_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sight: Sight | None = None
) -> torch.Tensor:
    """FlashAttention (Dao 2023, arXiv 2307.08691) where there are documents: torch's, over sequences of any
    lengths that lie one behind the other. On a GPU, in bf16 or fp16.
    """
    if sight is None or not sight.is_of_documents:
        return attend_by_sdpa(query, key, value, sight)
    from torch.nn.attention.varlen import varlen_attn  # slow to import

    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [b s, heads, D]
    bounds, longest, grouped = sight.document_bounds, query.size(2), query.size(1) != key.size(1)
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0), enable_gqa=grouped)
    assert isinstance(out, torch.Tensor), "it gives more where more is asked for"
    return out.unflatten(0, (query.size(0), -1)).transpose(1, 2)


def attention_of(device: torch.device) -> str:
    """The name of what serves a device best."""
    return {"cpu": "blocks", "cuda": "flex"}.get(device.type, "sdpa")


ATTENTIONS: dict[str, Attention] = {
    "blocks": attend_in_blocks,
    "sdpa": attend_by_sdpa,
    "flex": attend_by_flex,
    "varlen": attend_by_varlen,
}


@cache
def _flex_attention(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention  # slow to import

    attention: Callable[..., Any] = flex_attention
    return torch.compile(attention, dynamic=False) if compiled else attention
