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

from megalite.batch import Batch


@dataclass(frozen=True)
class AttentionSpans:
    """What each token of a micro batch may see; made once and used by every layer of a stage.

    starts: int64 [b, s], or None where attention is causal over the whole sample.
    given_positions: int64 [b, s] for the rotary angles, or None for each token's place in its document.
    """

    starts: torch.Tensor | None
    given_positions: torch.Tensor | None = None

    @classmethod
    def of(cls, batch: Batch) -> "AttentionSpans | None":
        """The spans of a batch; None where attention is causal and positions are 0, 1, 2, ..."""
        if batch.document_starts is None and batch.positions is None:
            return None
        return cls(batch.document_starts, batch.positions)

    @cached_property
    def positions(self) -> torch.Tensor:
        """Of each token for the rotary angles, [s, b]."""
        if self.given_positions is not None:
            return self.given_positions.T
        return (self._place - self._starts).T

    @cached_property
    def mask(self) -> torch.Tensor:
        """True where query i may see key j, [b, 1, s, s]: from its document's start up to itself."""
        place = self._place
        seen = (place >= self._starts.unsqueeze(-1)) & (place <= place.unsqueeze(-1))
        return seen.unsqueeze(1)

    @cached_property
    def block_mask(self) -> Any:
        """The same as FlexAttention's BlockMask: blocks that nothing sees are skipped."""
        from torch.nn.attention.flex_attention import create_block_mask  # slow to import

        starts, (batch, length) = self._starts, self._starts.shape

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

    @property
    def _starts(self) -> torch.Tensor:
        assert self.starts is not None
        return self.starts

    @property
    def _place(self) -> torch.Tensor:
        return torch.arange(self._starts.size(1), device=self._starts.device)


@cache
def _flex_attention(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention  # slow to import

    attention: Callable[..., Any] = flex_attention
    return torch.compile(attention, dynamic=False) if compiled else attention
