"""When each stage of a pipeline computes, and how long it waits (pure arithmetic)."""

from dataclasses import replace
from typing import NamedTuple

from megalite.pipeline.schedule import Action, Backward, Exchange, Forward, Transfer, build_schedule

FORWARD_SECONDS = 1.0
BACKWARD_SECONDS = 2.0  # two matrix products, for the gradients of input and weight, where forward has one


class Interval(NamedTuple):
    """One computation: `kind` is "forward" or "backward"; times in units of one forward."""

    start: float
    end: float
    stage: int
    kind: str
    micro_batch: int


def timeline(schedule_name: str, num_stages: int, num_micro_batches: int) -> list[Interval]:
    """All computations of one step, stage by stage, if communication took no time and had no buffers."""
    schedules = [
        build_schedule(schedule_name, stage, num_stages, num_micro_batches) for stage in range(num_stages)
    ]
    position = [0] * num_stages
    clock = [0.0] * num_stages
    intervals: list[Interval] = []

    def advance(stage: int) -> bool:
        """Do the next action of a stage if nothing holds it back."""
        if position[stage] == len(schedules[stage]):
            return False
        action = schedules[stage][position[stage]]
        if isinstance(action, Exchange):
            neighbour = action.transfers[0].peer
            if not _meets(action, stage, schedules[neighbour][position[neighbour] :]):
                return False
            clock[stage] = clock[neighbour] = max(clock[stage], clock[neighbour])
            position[neighbour] += 1
        else:
            intervals.append(_interval(action, clock[stage], stage))
            clock[stage] = intervals[-1].end
        position[stage] += 1
        return True

    while any(advance(stage) for stage in range(num_stages)):
        pass
    assert position == [len(actions) for actions in schedules], "the schedule is stuck"
    return sorted(intervals, key=lambda interval: (interval.stage, interval.start))


def bubble_fraction(intervals: list[Interval]) -> float:
    """The share of stage-time in which a stage waits: (p - 1) / (m + p - 1) for both schedules."""
    num_stages = 1 + max(interval.stage for interval in intervals)
    busy = sum(interval.end - interval.start for interval in intervals)
    return 1 - busy / (num_stages * max(interval.end for interval in intervals))


def _meets(exchange: Exchange, stage: int, actions_of_neighbour: list[Action]) -> bool:
    """Whether the neighbour's next action is this stage's exchange seen from the other side."""
    match actions_of_neighbour:
        case [Exchange(transfers), *_]:
            return set(transfers) == {mirrored(transfer, stage) for transfer in exchange.transfers}
    return False


def mirrored(transfer: Transfer, stage: int) -> Transfer:
    """A stage's transfer as its peer sees it."""
    return replace(transfer, verb="receive" if transfer.verb == "send" else "send", peer=stage)


def _interval(action: Forward | Backward, start: float, stage: int) -> Interval:
    if isinstance(action, Forward):
        return Interval(start, start + FORWARD_SECONDS, stage, "forward", action.micro_batch)
    return Interval(start, start + BACKWARD_SECONDS, stage, "backward", action.micro_batch)
