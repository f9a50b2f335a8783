"""A sequence cut over the context-parallel ranks: which of its places each rank has.

Causal attention costs more the further back a token stands. So the sequence is cut into 2c chunks, of which
rank r of c has the r-th from either end: all ranks work equally (zig-zag, as in Megatron-LM).

    c = 2    chunks  0 1 2 3    rank 0 has 0 and 3, rank 1 has 1 and 2
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch

from megalite.parallel.context import Ranks


@dataclass(frozen=True)
class SequenceCut:
    """Of samples of `length` tokens, over `ranks`, with its tables of places on a device.

    Raises ValueError where 2c does not divide the length.
    """

    length: int
    ranks: Ranks
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        if self.length % self.num_chunks:
            raise ValueError(
                f"a sequence of {self.length} cannot be cut into {self.num_chunks} chunks, 2 for each of "
                f"{self.ranks.size} context-parallel ranks: use a multiple of {self.num_chunks}"
            )

    @property
    def num_chunks(self) -> int:
        """2c, but the whole for one rank."""
        return 2 * self.ranks.size if self.ranks.size > 1 else 1

    @property
    def chunk_length(self) -> int:
        """Tokens of a chunk."""
        return self.length // self.num_chunks

    def chunks(self, rank: int | None = None) -> tuple[int, ...]:
        """The numbers of a rank's chunks, in the order in which it holds them; by default this rank's."""
        rank = self.ranks.rank if rank is None else rank
        return (rank, self.num_chunks - 1 - rank) if self.ranks.size > 1 else (0,)

    def span(self, chunk: int) -> slice:
        """The places of a chunk in the sequence."""
        return slice(chunk * self.chunk_length, (chunk + 1) * self.chunk_length)

    @cached_property
    def places(self) -> torch.Tensor:
        """Where each token of this rank stands in the sequence, int64 [s/c]."""
        return self._places_of(self.ranks.rank)

    @cached_property
    def all_places(self) -> torch.Tensor:
        """The same of all ranks, one after the other, as a gather along the sequence brings them; [s]."""
        return torch.cat([self._places_of(rank) for rank in range(self.ranks.size)])

    def part(self, whole: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's part of a whole sequence along a dimension."""
        return self._taken(whole, dim, self.places)

    def in_order(self, gathered: torch.Tensor, dim: int) -> torch.Tensor:
        """A sequence gathered rank by rank, in its own order."""
        return self._taken(gathered, dim, self._order)

    def by_rank(self, whole: torch.Tensor, dim: int) -> torch.Tensor:
        """The inverse: a whole sequence with the parts of the ranks one after the other."""
        return self._taken(whole, dim, self.all_places)

    @cached_property
    def _order(self) -> torch.Tensor:
        return self.all_places.argsort()

    def _taken(self, x: torch.Tensor, dim: int, places: torch.Tensor) -> torch.Tensor:
        return x if self.ranks.size == 1 else x.index_select(dim, places.to(x.device))

    def _places_of(self, rank: int) -> torch.Tensor:
        places = torch.arange(self.length, device=self.device)
        return torch.cat([places[self.span(chunk)] for chunk in self.chunks(rank)])
