"""The transfers of a pipeline, derived from what its ranks compute (pure arithmetic)."""

from collections.abc import Sequence
from typing import NamedTuple

from megalite.pipeline.actions import Action, Compute, Handover, Kind, Transfer
from megalite.pipeline.placement import Placement
from megalite.pipeline.timeline import Interval, made, play


class _Passing(NamedTuple):
    """A tensor that passes from one stage to the next: when it is made, and where it goes."""

    time: float
    distance: int  # stages that kind of tensor has passed: what comes in is before what goes out at that time
    kind: Kind
    micro_batch: int
    source: tuple[int, int]  # rank, chunk
    target: tuple[int, int]


def with_transfers(orders: Sequence[Sequence[Compute]], placement: Placement) -> list[list[Action]]:
    """Each rank's computations, with what goes from one to another between them.

    All transfers have one order, that of the planned timeline, and each rank posts its own in this order:
    every send meets its receive, and nothing needs to be buffered, even if each transfer were waited for
    where it is posted. A send comes right after what makes it; a receive before the computation
    in which it is planned to arrive, so that it may overlap with it.
    """
    intervals = play(orders, placement)
    lists: list[list[Action]] = [[] for _ in orders]
    left = [[i for i in intervals if i.rank == rank] for rank in range(len(orders))]

    def compute_until(rank: int, time: float, *, inclusive: bool) -> None:
        while left[rank] and (left[rank][0].end < time or (inclusive and left[rank][0].end == time)):
            lists[rank].append(left[rank].pop(0).action)

    for time, _, kind, micro_batch, source, target in sorted(_passings(intervals, placement)):
        (sender, made_by), (receiver, used_by) = source, target
        compute_until(sender, time, inclusive=True)
        if sender == receiver:
            lists[sender].append(Handover(kind, micro_batch, made_by, used_by))
            continue
        compute_until(receiver, time, inclusive=False)
        lists[sender].append(Transfer("send", kind, micro_batch, receiver, made_by))
        lists[receiver].append(Transfer("receive", kind, micro_batch, sender, used_by))
    for rank in range(len(orders)):
        compute_until(rank, float("inf"), inclusive=True)
    return lists


def _passings(intervals: Sequence[Interval], placement: Placement) -> list[_Passing]:
    """Every tensor that another stage takes."""
    passings = []
    for _, end, rank, action in intervals:
        stage = placement.stage(rank, action.chunk)
        tensor = made(action, stage)
        if tensor is None:
            continue
        kind, step = tensor[0], 1 if tensor[0] == "activation" else -1
        if 0 <= stage + step < placement.num_stages:
            distance = stage if step == 1 else placement.num_stages - 1 - stage
            source, target = (rank, action.chunk), placement.holder(stage + step)
            passings.append(_Passing(end, distance, kind, action.micro_batch, source, target))
    return passings
