"""Collectives over a tensor- or context-parallel group, in conjugate pairs.

Shapes: s sequence (dimension 0), b micro batch, h features, t group size.
Each backward is the transpose of its forward, and none writes to a tensor that it did not allocate:
autograd may hand one gradient tensor to two branches.

                        forward          backward          letter
    copy_to_tp          identity         all-reduce        f       Shoeybi 2019, arXiv 1909.08053
    reduce_from_tp      all-reduce       identity          g       Shoeybi 2019
    gather_sequence     all-gather       reduce-scatter    g       Korthikanti 2022, arXiv 2205.05198
    scatter_sequence    reduce-scatter   all-gather        g-bar   Korthikanti 2022
    exchange            all-to-all       all-to-all                Jacobs 2023, arXiv 2309.14509
    sum_over            all-reduce       all-reduce                f after g
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megalite.parallel.context import Group, group_size
from megalite.parallel.node_memory import WAIT, Exchange, node_memory, span, sum_into


class _SumOfParts:
    """Parts [t, ...] on their way, t from 2 on, that are summed into `total` [...] when they are there."""

    def __init__(self, work: "Work", parts: torch.Tensor, total: torch.Tensor) -> None:
        self._work, self._parts, self._total = work, parts, total

    def wait(self) -> None:
        assert self._work is not None
        self._work.wait()
        sum_into(self._total, self._parts)


Work = dist.Work | Exchange | _SumOfParts | None
SUMMED_WHOLE = {"cpu"}  # devices whose reduce-scatter, gloo's, sums everything on every rank

# torch 2.13 gave these two new names and warns about the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def start_all_reduce(x: torch.Tensor, group: Group) -> tuple[torch.Tensor, Work]:
    """Begin a sum over the group: a tensor of x's shape, valid after wait_for(work)."""
    if group_size(group) == 1:
        return x, None
    if memory := node_memory(group, x):
        total = torch.empty_like(x, memory_format=torch.contiguous_format)
        return total, memory.all_reduce(x, total)
    total = x.clone(memory_format=torch.contiguous_format)
    return total, dist.all_reduce(total, group=group, async_op=True)


def start_mean(x: torch.Tensor, group: Group) -> tuple[torch.Tensor, Work]:
    """Begin a mean over the group, as a sum."""
    return start_all_reduce(x / group_size(group), group) if group_size(group) > 1 else (x, None)


def start_all_gather(x: torch.Tensor, group: Group) -> tuple[torch.Tensor, Work]:
    """Begin [s/t, ...] -> [s, ...]."""
    if group_size(group) == 1:
        return x, None
    full = x.new_empty(x.size(0) * group_size(group), *x.shape[1:])
    if memory := node_memory(group, x):
        return full, memory.all_gather(x, full)
    return full, _all_gather(full, x.contiguous(), group=group, async_op=True)


def by_rank(x: torch.Tensor, group: Group) -> torch.Tensor:
    """[s, ...] as [t, s/t, ...], the part of each rank: a view. ValueError where s does not divide."""
    size = group_size(group)
    if x.size(0) % size:
        raise ValueError(
            f"a sequence of {x.size(0)} cannot be cut over tp_size {size}: "
            f"choose a seq_length that is a multiple of {size}"
        )
    return x.unflatten(0, (size, -1))


def start_reduce_scatter(x: torch.Tensor, group: Group) -> tuple[torch.Tensor, Work]:
    """Begin the sum of [s, ...] over the group, of which each rank keeps its [s/t, ...]."""
    if group_size(group) == 1:
        return x, None
    parts = by_rank(x, group)
    part = x.new_empty(parts.shape[1:])
    if memory := node_memory(group, part, entries=group_size(group) - 1):
        return part, memory.reduce_scatter(parts, part)
    if x.device.type in SUMMED_WHOLE:
        parts, work = start_exchange(parts, group)
        return part, _SumOfParts(work, parts, part)
    return part, _reduce_scatter(part, x.contiguous(), group=group, async_op=True)


def start_exchange(x: torch.Tensor, group: Group) -> tuple[torch.Tensor, Work]:
    """Begin [t, ...] -> [t, ...]: entry j goes to rank j, and entry j of the result comes from it."""
    if group_size(group) == 1:
        return x, None
    coming = torch.empty_like(x, memory_format=torch.contiguous_format)
    if memory := node_memory(group, x[0], entries=group_size(group) - 1):
        return coming, memory.all_to_all(x, coming)
    return coming, dist.all_to_all_single(coming, x.contiguous(), group=group, async_op=True)


def wait_for(work: Work) -> None:
    """Wait for a collective that was begun; None is one that had nothing to do."""
    if work is None:
        return
    with span(WAIT):
        work.wait()


class Gathering:
    """[s/t, ...] -> [s, ...] that may be begun before it is asked for."""

    def __init__(self, x: torch.Tensor, group: Group) -> None:
        self._x, self._group = x, group
        self._begun: tuple[torch.Tensor, Work] | None = None

    def begin(self) -> None:
        """Begin, if that was not done."""
        if self._begun is None:
            self._begun = start_all_gather(self._x, self._group)

    def whole(self) -> torch.Tensor:
        """The whole, once it is there; asked for once, since it is not kept."""
        self.begin()
        assert self._begun is not None
        (full, work), self._begun = self._begun, None
        wait_for(work)
        return full


Start = Callable[[torch.Tensor, Group], tuple[torch.Tensor, Work]]


def _finished(start: Start, x: torch.Tensor, group: Group) -> torch.Tensor:
    result, work = start(x, group)
    wait_for(work)
    return result


def _identity(x: torch.Tensor, group: Group) -> tuple[torch.Tensor, Work]:
    return x, None


def _pair(there: Start, back: Start) -> Callable[[torch.Tensor, Group], torch.Tensor]:
    class Pair(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
            ctx.group = group
            return _finished(there, x, group)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
            return _finished(back, grad, ctx.group), None

    def apply(x: torch.Tensor, group: Group) -> torch.Tensor:
        return x if group_size(group) == 1 else Pair.apply(x, group)

    return apply


copy_to_tp = _pair(_identity, start_all_reduce)
reduce_from_tp = _pair(start_all_reduce, _identity)
gather_sequence = _pair(start_all_gather, start_reduce_scatter)
scatter_sequence = _pair(start_reduce_scatter, start_all_gather)
exchange = _pair(start_exchange, start_exchange)
sum_over = _pair(start_all_reduce, start_all_reduce)

# No transpose: of copies, whose gradients are parts of a sum, each gets an equal part of the same sum.
# Products that round want it so, since they would round the parts otherwise than their sum.
equal_parts = _pair(_identity, start_mean)
