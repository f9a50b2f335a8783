"""Which keys each query sees, as masks and as blocks of rows.

Shapes: b micro batch, s_q queries, s_k keys. A place is a token's number in its sample. Queries and keys may
be any ascending selections of places: those of one rank, or of another, where a sample lies on several.
"""

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class Hidden:
    """Columns of a block that some of its rows do not see; all rows see its other columns.

    columns: counted from the block's first key.
    by: bool [rows, 1, columns], true where a row does not see a column.
    """

    columns: slice
    by: torch.Tensor


@dataclass(frozen=True)
class Block:
    """Neighbouring queries, and the keys from the first to the last that any of them sees.

    Attributes:
        samples: of the micro batch that it is of.
        rows: of the queries.
        keys: empty where no row sees any.
        hidden: what has to be masked.
        blind: bool [rows, 1, 1], rows that see no key; None where there are none, or no keys.
    """

    samples: slice
    rows: slice
    keys: slice
    hidden: tuple[Hidden, ...] = ()
    blind: torch.Tensor | None = None

    @property
    def num_rows(self) -> int:
        """How many queries of each head."""
        return self.rows.stop - self.rows.start

    @property
    def num_keys(self) -> int:
        """How many keys of each head."""
        return self.keys.stop - self.keys.start


@dataclass(frozen=True)
class Sight:
    """Each query sees the keys from the start of its document up to itself.

    query_places: int64 [s_q], ascending.
    key_places: int64 [s_k], ascending.
    starts: int64 [b, s_q], the place of the first token of each query's document; None means that of the
        sample.
    """

    query_places: torch.Tensor
    key_places: torch.Tensor
    starts: torch.Tensor | None = None
    _blocks: dict[int, list[Block]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def within(cls, starts: torch.Tensor) -> "Sight":
        """Of whole samples that hold documents. starts: int64 [b, s]."""
        places = torch.arange(starts.size(1), device=starts.device)
        return cls(places, places, starts)

    @cached_property
    def mask(self) -> torch.Tensor:
        """True where query i sees key j, [b, 1, s_q, s_k], or [1, 1, s_q, s_k] without documents."""
        starts = self.query_places.new_zeros(1, 1) if self.starts is None else self.starts
        return _seen(self.query_places, starts, self.key_places).unsqueeze(1)

    @cached_property
    def flex_mask(self) -> Any:
        """The same of whole samples, as FlexAttention's BlockMask: blocks that nothing sees are skipped."""
        from torch.nn.attention.flex_attention import create_block_mask  # slow to import

        assert self.starts is not None, "FlexAttention serves documents alone"
        assert self.query_places is self.key_places, "FlexAttention serves whole samples alone"
        starts, (batch, length) = self.starts, self.starts.shape

        def may_see(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
            return (j <= i) & (j >= starts[b, i])

        return create_block_mask(may_see, batch, None, length, length, device=str(starts.device))

    @property
    def is_of_documents(self) -> bool:
        """Whether all keys are there, and only some of them seen from the sample's start."""
        return self.starts is not None and self.query_places is self.key_places

    @cached_property
    def document_bounds(self) -> torch.Tensor:
        """Of whole samples, one behind the other: where documents begin, and the end; int32 [documents + 1].

        How many there are is read from the device, once for all layers.
        """
        assert self.starts is not None and self.is_of_documents
        begins = (self.starts == self.query_places).flatten().nonzero().flatten()
        return torch.cat([begins, begins.new_full((1,), self.starts.numel())]).to(torch.int32)

    def blocks(self, num_rows: int) -> list[Block]:
        """All queries in blocks of so many rows; with documents, each sample in blocks of its own."""
        if num_rows not in self._blocks:
            samples = [None] if self.starts is None else range(self.starts.size(0))
            firsts = range(0, len(self.query_places), num_rows)
            self._blocks[num_rows] = [
                self._block(sample, first, num_rows) for sample in samples for first in firsts
            ]
        return self._blocks[num_rows]

    def _block(self, sample: int | None, first: int, num_rows: int) -> Block:
        places = self.query_places[first : first + num_rows]
        rows = slice(first, first + len(places))
        starts = places.new_zeros(1) if sample is None or self.starts is None else self.starts[sample, rows]
        samples = slice(None) if sample is None else slice(sample, sample + 1)
        # Keys ascend, so each row sees a range of them: what no row sees is not looked at, however long.
        low = torch.searchsorted(self.key_places, starts.expand_as(places).contiguous())
        high = torch.searchsorted(self.key_places, places, right=True)
        is_blind = low >= high
        if is_blind.all():
            return Block(samples, rows, slice(0, 0))
        keys = slice(int(low[~is_blind].min()), int(high[~is_blind].max()))
        by_all = slice(int(low.max()), int(high.min()))
        if is_blind.any() or by_all.start >= by_all.stop:
            by_all = slice(keys.stop, keys.stop)
        sides = (slice(keys.start, by_all.start), slice(by_all.stop, keys.stop))
        hidden = tuple(
            Hidden(
                slice(side.start - keys.start, side.stop - keys.start),
                ~_seen(places, starts, self.key_places[side]).unsqueeze(1),
            )
            for side in sides
            if side.start < side.stop
        )
        return Block(samples, rows, keys, hidden, is_blind.view(-1, 1, 1) if is_blind.any() else None)


def _seen(query_places: torch.Tensor, starts: torch.Tensor, key_places: torch.Tensor) -> torch.Tensor:
    """bool [..., s_q, s_k] of starts [..., s_q]."""
    return (key_places >= starts.unsqueeze(-1)) & (key_places <= query_places.unsqueeze(-1))


@lru_cache(maxsize=8)
def causal(length: int, device: torch.device) -> Sight:
    """Every token of a whole sample sees itself and all before."""
    places = torch.arange(length, device=device)
    return Sight(places, places)
