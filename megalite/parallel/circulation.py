"""Keys and values of every context-parallel rank to all of them, and their gradients home.

Shapes: c ranks, [...] what each of them has, of one shape on all. Rank j has its sources in the order j,
j - 1, j - 2, ...: its own first. Two ways do the same:

            memory on a rank      hops
    Gather  all c parts           one all-gather; one reduce-scatter home
    Ring    two parts             c - 1 from each rank to the next, while one part is used; one more home
                                  (Liu 2023, arXiv 2310.01889)
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from megalite.parallel.context import Ranks
from megalite.parallel.mappings import start_all_gather, start_reduce_scatter, wait_for

Contribution = Callable[[int, torch.Tensor], torch.Tensor]  # (source, its part) -> gradient of it, from here


def _sources(ranks: Ranks) -> list[int]:
    return [(ranks.rank - hop) % ranks.size for hop in range(ranks.size)]


class Gather:
    """All parts at once."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def parts(self, own: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """(source, its part), own first."""
        whole, work = start_all_gather(own.unsqueeze(0), self.ranks.group)
        wait_for(work)
        for source in _sources(self.ranks):
            yield source, whole[source]

    def summed(self, own: torch.Tensor, contribution: Contribution) -> torch.Tensor:
        """The sum over all ranks of their contributions to this rank's part, in the format they have."""
        gradients = dict.fromkeys(range(self.ranks.size), own)
        for source, part in self.parts(own):
            gradients[source] = contribution(source, part)
        total, work = start_reduce_scatter(torch.stack(list(gradients.values())), self.ranks.group)
        wait_for(work)
        return total.squeeze(0)


class Ring:
    """One part after the other, from each rank to the next."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def parts(self, own: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """(source, its part), own first; the next part is on its way while one is used."""
        part = own.contiguous()
        for hop, source in enumerate(_sources(self.ranks)):
            is_last = hop == self.ranks.size - 1
            coming, works = (part, []) if is_last else self._pass_on(part)
            yield source, part
            for work in works:
                work.wait()
            part = coming

    def summed(self, own: torch.Tensor, contribution: Contribution) -> torch.Tensor:
        """The same as Gather's. What is summed so far travels behind its part, and at last home."""
        total: torch.Tensor | None = None
        for source, part in self.parts(own):
            mine = contribution(source, part)
            if total is not None:
                mine = mine + self._passed_on(total)
            total = mine
        assert total is not None
        return self._passed_on(total)

    def _passed_on(self, tensor: torch.Tensor) -> torch.Tensor:
        coming, works = self._pass_on(tensor.contiguous())
        for work in works:
            work.wait()
        return coming

    def _pass_on(self, tensor: torch.Tensor) -> tuple[torch.Tensor, list[dist.Work]]:
        """Begin to send to the next rank and to receive from the one before."""
        group, size, rank = self.ranks.group, self.ranks.size, self.ranks.rank
        assert group is not None
        coming = torch.empty_like(tensor)
        to, of = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
        operations = [dist.P2POp(dist.isend, tensor, to, group), dist.P2POp(dist.irecv, coming, of, group)]
        return coming, dist.batch_isend_irecv(operations)
