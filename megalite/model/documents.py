"""Samples that hold several documents: attention stays within each, and positions restart.

Shapes: s sequence, b micro batch. A document is told by where it starts: `starts[b, i]` is the place in
the sample of the first token of token i's document.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Documents:
    """The documents of one micro batch; made once and used by every layer of a stage.

    starts: int64 [b, s].
    """

    starts: torch.Tensor

    @cached_property
    def positions(self) -> torch.Tensor:
        """Place of each token in its document, [s, b]."""
        return (torch.arange(self.starts.size(1), device=self.starts.device) - self.starts).T

    @cached_property
    def mask(self) -> torch.Tensor:
        """True where query i may see key j, [b, 1, s, s]: from its document's start up to itself."""
        place = torch.arange(self.starts.size(1), device=self.starts.device)
        seen = (place >= self.starts.unsqueeze(-1)) & (place <= place.unsqueeze(-1))
        return seen.unsqueeze(1)

    @cached_property
    def block_mask(self) -> Any:
        """The same as FlexAttention's BlockMask: blocks that nothing sees are skipped."""
        from torch.nn.attention.flex_attention import create_block_mask  # slow to import

        starts, (batch, length) = self.starts, self.starts.shape

        def may_see(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
            return (j <= i) & (j >= starts[b, i])

        return create_block_mask(may_see, batch, None, length, length, device=str(starts.device))

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention within documents: query [b, heads, s, D], key and value [b, KV heads, s, D]."""
        if query.is_cuda:
            return self.attend_in_blocks(query, key, value)
        grouped = query.size(1) != key.size(1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask, enable_gqa=grouped)

    def attend_in_blocks(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The same by FlexAttention (arXiv 2412.05496), compiled where there is a GPU to compile for."""
        attention = _flex_attention(compiled=query.is_cuda)
        grouped = query.size(1) != key.size(1)
        return attention(query, key, value, block_mask=self.block_mask, enable_gqa=grouped)


@cache
def _flex_attention(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention  # slow to import

    attention: Callable[..., Any] = flex_attention
    return torch.compile(attention, dynamic=False) if compiled else attention
