"""Collectives over a tensor-parallel group, in conjugate pairs.

Shapes: s sequence (dimension 0), b micro batch, h features, t group size.
Each backward is the transpose of its forward, and none writes to a tensor that it did not allocate:
autograd may hand one gradient tensor to two branches.

                        forward          backward          letter
    copy_to_tp          identity         all-reduce        f       Shoeybi 2019, arXiv 1909.08053
    reduce_from_tp      all-reduce       identity          g       Shoeybi 2019
    gather_sequence     all-gather       reduce-scatter    g       Korthikanti 2022, arXiv 2205.05198
    scatter_sequence    reduce-scatter   all-gather        g-bar   Korthikanti 2022
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megalite.parallel.context import Group, group_size

Work = dist.Work | None

# torch 2.13 gave these two new names and warns about the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def start_all_reduce(x: torch.Tensor, group: Group) -> tuple[torch.Tensor, Work]:
    """Begin a sum over the group: a tensor of x's shape, valid after wait_for(work)."""
    if group_size(group) == 1:
        return x, None
    total = x.clone(memory_format=torch.contiguous_format)
    return total, dist.all_reduce(total, group=group, async_op=True)


def start_all_gather(x: torch.Tensor, group: Group) -> tuple[torch.Tensor, Work]:
    """Begin [s/t, ...] -> [s, ...]."""
    if group_size(group) == 1:
        return x, None
    full = x.new_empty(x.size(0) * group_size(group), *x.shape[1:])
    return full, _all_gather(full, x.contiguous(), group=group, async_op=True)


def start_reduce_scatter(x: torch.Tensor, group: Group) -> tuple[torch.Tensor, Work]:
    """Begin the sum of [s, ...] over the group, of which each rank keeps its [s/t, ...]."""
    if group_size(group) == 1:
        return x, None
    part_size, remainder = divmod(x.size(0), group_size(group))
    if remainder:
        raise ValueError(
            f"a sequence of {x.size(0)} cannot be cut over tp_size {group_size(group)}: "
            f"choose a seq_length that is a multiple of {group_size(group)}"
        )
    part = x.new_empty(part_size, *x.shape[1:])
    return part, _reduce_scatter(part, x.contiguous(), group=group, async_op=True)


def wait_for(work: Work) -> None:
    """Wait for a collective that was begun; None is one that had nothing to do."""
    if work is not None:
        work.wait()


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
