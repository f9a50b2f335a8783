"""Collectives through memory that the ranks of a group share, where they run on the CPUs of one node.

gloo sends through sockets: each byte is copied into the kernel and out of it, by threads that take cores from
the products. Here a rank writes what it says once, to memory that the others read it from:

    rank r's slots      exchange k is said in slot k mod SLOTS
    a pipe per pair     THERE: it is written; READ: the other has read it, and the slot may be written again

All ranks of a group begin the same collectives in the same order, as with any backend, so that a count of
signs tells which exchange they belong to. What does not fit into a slot is left to the backend.

A group is torch's object, to which nothing can be added: whoever has it finds its memory by it.
"""

import os
import select
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import _profiler_enabled
from torch.distributed.constants import default_pg_timeout
from torch.profiler import record_function

from megalite.parallel.reach import Reach, reach
from megalite.parallel.slots import SLOTS, fits

WAIT = "wait for a collective"  # what a trace of torch's profiler calls it, which sees no waits itself
THERE, READ = b"t", b"r"
LONGEST_WAIT = default_pg_timeout  # after which a backend gives up too
_SHARED: "weakref.WeakKeyDictionary[dist.ProcessGroup, NodeMemory]" = weakref.WeakKeyDictionary()

Said = Callable[[int], torch.Tensor]  # by a rank, to this one
Collect = Callable[[Said], None]


def span(name: str) -> AbstractContextManager[Any]:
    """For a trace of torch's profiler, where one runs."""
    return record_function(name) if _profiler_enabled() else nullcontext()


class Exchange:
    """What a collective waits for: a `Work` whose results are collected by the rank that waits."""

    def __init__(self, collect: Callable[[], None]) -> None:
        self._collect: Callable[[], None] | None = collect

    def wait(self) -> None:
        """Collect the results, once."""
        if self._collect is not None:
            collect, self._collect = self._collect, None  # lets go of the tensors
            collect()


class NodeMemory:
    """The slots of all ranks of a group, as one of them sees them. Tensors are on the CPU."""

    def __init__(self, rank: int, reached: Reach) -> None:
        self.rank, self.size = rank, len(reached.slots)
        self._slots, self._from_rank, self._to_rank = reached.slots, reached.from_rank, reached.to_rank
        self._begun: list[Exchange] = []  # those whose slots are taken, oldest first
        self._count = 0  # of all exchanges begun
        self._unread = 0  # the oldest exchange that this rank has not read
        self._read: set[int] = set()  # younger ones that it has
        self._signs = {sign: dict.fromkeys(self._from_rank, 0) for sign in (THERE, READ)}
        weakref.finalize(self, _close, [*self._from_rank.values(), *self._to_rank.values()])

    def all_reduce(self, x: torch.Tensor, total: torch.Tensor) -> Exchange:
        """The sum of x over the ranks into `total`, in the order of ranks: equal on all to the last bit."""

        def collect(said: Said) -> None:
            sum_into(total, map(said, range(self.size)))

        return self._begin("all_reduce", [x], collect)

    def all_gather(self, x: torch.Tensor, full: torch.Tensor) -> Exchange:
        """x [n, ...] of each rank into `full` [t n, ...]."""
        parts = full.unflatten(0, (self.size, -1))
        parts[self.rank].copy_(x.detach())
        return self._begin("all_gather", [x], self._bring_into(parts))

    def all_to_all(self, x: torch.Tensor, coming: torch.Tensor) -> Exchange:
        """Entry j of x [t, ...] to rank j, into its `coming` [t, ...]."""
        coming[self.rank].copy_(x[self.rank].detach())
        return self._begin("all_to_all", list(x), self._bring_into(coming))

    def reduce_scatter(self, parts: torch.Tensor, part: torch.Tensor) -> Exchange:
        """The sum over the ranks, in their order, of entry j of `parts` [t, ...], into rank j's `part`."""
        mine = parts[self.rank].detach()

        def collect(said: Said) -> None:
            sum_into(part, (mine if rank == self.rank else said(rank) for rank in range(self.size)))

        return self._begin("reduce_scatter", list(parts), collect)

    def _bring_into(self, parts: torch.Tensor) -> Collect:
        """What others say, into their entries of `parts` [t, ...]."""

        def collect(said: Said) -> None:
            for rank in self._from_rank:
                parts[rank].copy_(said(rank))

        return collect

    def _begin(self, name: str, said: list[torch.Tensor], collect: Collect) -> Exchange:
        """Say the same to all, or entry j to rank j; `collect` is given what rank r has said to this one."""
        number, like, to_all = self._count, said[0], len(said) == 1
        self._count += 1
        with span(f"node:{name}"):
            self._make_room(number)
            for reader, x in enumerate(said):
                if to_all or reader != self.rank:
                    entry = 0 if to_all else _entry(self.rank, reader)
                    self._place(self.rank, number, entry, like).copy_(x.detach())
            self._tell(THERE)

        def said_by(rank: int) -> torch.Tensor:
            return self._place(rank, number, 0 if to_all else _entry(rank, self.rank), like)

        def finish() -> None:
            self._wait_for(THERE, number + 1)
            with span(f"node:{name}"):
                collect(said_by)
            self._has_read(number)

        exchange = Exchange(finish)
        self._begun.append(exchange)
        return exchange

    def _make_room(self, number: int) -> None:
        """Wait until all have read what was said in the slot of exchange `number`.

        This rank first reads what it has not read of that time: were all to wait for each other's reading
        here, none would read.
        """
        if number >= SLOTS:
            with span(WAIT):
                self._begun.pop(0).wait()
                self._wait_for(READ, number + 1 - SLOTS)

    def _has_read(self, number: int) -> None:
        """Say so in order: a count of signs says nothing of an exchange that was read before an older one."""
        self._read.add(number)
        while self._unread in self._read:
            self._read.remove(self._unread)
            self._unread += 1
            self._tell(READ)

    def _place(self, rank: int, number: int, entry: int, like: torch.Tensor) -> torch.Tensor:
        begin = entry * like.nbytes
        room = self._slots[rank][number % SLOTS]
        return room[begin : begin + like.nbytes].view(like.dtype).view(like.shape)

    def _tell(self, sign: bytes) -> None:
        for rank, pipe in self._to_rank.items():
            try:
                os.write(pipe, sign)
            except BrokenPipeError:
                if sign == THERE:  # else it has nothing more to say, and need not know
                    raise self._lost(rank, "has ended") from None

    def _wait_for(self, sign: bytes, count: int) -> None:
        for rank, pipe in self._from_rank.items():
            while self._signs[sign][rank] < count:
                self._listen(rank, pipe)

    def _listen(self, rank: int, pipe: int) -> None:
        poll = select.poll()  # select takes no descriptor above 1023
        poll.register(pipe, select.POLLIN)
        ready = poll.poll(LONGEST_WAIT.total_seconds() * 1000)
        signs = os.read(pipe, 4096) if ready else b""
        if not signs:
            raise self._lost(
                rank, "has ended" if ready else f"has said nothing for {LONGEST_WAIT.total_seconds():g} s"
            )
        for sign, counts in self._signs.items():
            counts[rank] += signs.count(sign)

    def _lost(self, rank: int, why: str) -> dist.DistBackendError:
        return dist.DistBackendError(f"rank {rank} of a group of {self.size} on this node {why}")


def share_memory(groups: Iterable[dist.ProcessGroup | None]) -> None:
    """Give these groups such memory, where their ranks reach each other's; called by all ranks of each."""
    for group in groups:
        if group is not None and group.size() > 1 and group not in _SHARED:
            reached = reach(group)
            if reached is not None:
                _SHARED[group] = NodeMemory(group.rank(), reached)


def node_memory(group: dist.ProcessGroup | None, x: torch.Tensor, entries: int = 1) -> NodeMemory | None:
    """The memory that a group shares, if `entries` tensors like x go into a slot of it."""
    if group is None or x.device.type != "cpu" or not fits(x.nbytes, entries):
        return None
    return _SHARED.get(group)


def _entry(writer: int, reader: int) -> int:
    """Where what is for `reader` alone lies in a slot: a rank says nothing to itself."""
    return reader - (reader > writer)


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def sum_into(total: torch.Tensor, terms: Iterable[torch.Tensor]) -> None:
    """The sum of two terms or more, in their order."""
    first, second, *others = terms
    torch.add(first, second, out=total)
    for term in others:
        total.add_(term)
