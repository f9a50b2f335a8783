"""A collective over every group of a run, checked and timed."""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from megalite.parallel.context import GROUPS, ParallelContext

TENSOR_BYTES = {"cuda": 64 << 20, "cpu": 1 << 20}
REPETITIONS = 3


def names_of_groups(context: ParallelContext) -> dict[str, tuple[str, ...]]:
    """The axes of every kind of group that has several ranks, by name; kinds of the same ranks once."""
    kinds: dict[tuple[tuple[int, ...], ...], tuple[str, ...]] = {}
    for axes in GROUPS:
        ranks = tuple(map(tuple, context.topology.groups(*axes)))
        if len(ranks[0]) > 1:
            kinds.setdefault(ranks, axes)
    return {" x ".join(axes): axes for axes in kinds.values()}


def measure_groups(context: ParallelContext, enter: Callable[[str], None]) -> dict[str, float]:
    """Bus bandwidth of an all-reduce over each of this rank's groups, in bytes per second. Collective.

    It is 2 (n - 1) / n times the tensor's bytes over the seconds, as NCCL's tests count it; 0 where the sum
    is wrong. enter: is told the name of the group that comes next.
    """
    speeds = {}
    for name, axes in names_of_groups(context).items():
        enter(name)
        speeds[name] = _measure(context, axes)
    return speeds


def _measure(context: ParallelContext, axes: tuple[str, ...]) -> float:
    ranks, size_bytes = context[axes], TENSOR_BYTES[context.device.type]
    seconds, total = [], ranks.size * (ranks.size + 1) // 2
    for _ in range(1 + REPETITIONS):  # the first one opens connections
        tensor = torch.full((size_bytes // 4,), ranks.rank + 1.0, device=context.device)
        if context.device.type == "cuda":
            torch.cuda.synchronize(context.device)
        started = time.perf_counter()
        dist.all_reduce(tensor, group=ranks.group)
        if context.device.type == "cuda":
            torch.cuda.synchronize(context.device)
        seconds.append(time.perf_counter() - started)
        if not bool((tensor == total).all()):
            return 0.0
    return 2 * (ranks.size - 1) / ranks.size * size_bytes / min(seconds[1:])
