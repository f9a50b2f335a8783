"""Samples that hold several documents: attention stays within each, and positions restart.

Shapes: s sequence, b micro batch. A document is told by where it starts: `starts[b, i]` is the place in
the sample of the first token of token i's document.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from megalite.batch import Batch
from megalite.kernels.attention import Attention
from megalite.kernels.sight import Sight


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

    @property
    def num_positions(self) -> int:
        """Positions are below it, or else below the model's longest context."""
        return 0

    @cached_property
    def sight(self) -> Sight | None:
        """Which tokens each token sees; None where that is all up to itself."""
        return None if self.starts is None else Sight.within(self.starts)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention: Attention
    ) -> torch.Tensor:
        """Attention within documents: query [b, heads, s, D], key and value [b, KV heads, s, D]."""
        return attention(query, key, value, self.sight)

    @property
    def _starts(self) -> torch.Tensor:
        assert self.starts is not None
        return self.starts

    @property
    def _place(self) -> torch.Tensor:
        return torch.arange(self._starts.size(1), device=self._starts.device)
