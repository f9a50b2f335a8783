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


def attention_of(device: torch.device) -> str:
    """The name of what serves a device best."""
    return {"cpu": "blocks", "cuda": "flex"}.get(device.type, "sdpa")


ATTENTIONS: dict[str, Attention] = {
    "blocks": attend_in_blocks,
    "sdpa": attend_by_sdpa,
    "flex": attend_by_flex,
}


@cache
def _flex_attention(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention  # slow to import

    attention: Callable[..., Any] = flex_attention
    return torch.compile(attention, dynamic=False) if compiled else attention
