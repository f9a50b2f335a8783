"""When each rank computes and how long it waits, if transfers took no time (pure arithmetic)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megalite.pipeline.actions import Backward, BackwardInput, BackwardWeight, Compute, Forward, Kind
from megalite.pipeline.placement import Placement


@dataclass(frozen=True)
class Durations:
    """Of one micro batch through all chunks of a rank. By default each is one matrix product of a layer."""

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0

    def of(self, action: Compute) -> float:
        """The seconds, or other units, of an action."""
        whole = self.backward_input + self.backward_weight
        by_kind = {Forward: self.forward, BackwardInput: self.backward_input}
        by_kind |= {BackwardWeight: self.backward_weight, Backward: whole}
        return by_kind[type(action)]


class Interval(NamedTuple):
    """One computation; times in units of one forward through all chunks of a rank."""

    start: float
    end: float
    rank: int
    action: Compute


Tensor = tuple[Kind, int, int]  # what a stage makes of a micro batch, and the stage


def made(action: Compute, stage: int) -> Tensor | None:
    """What an action gives to another stage, if there is one."""
    if isinstance(action, BackwardWeight):
        return None
    return "activation" if isinstance(action, Forward) else "gradient", action.micro_batch, stage


def play(
    orders: Sequence[Sequence[Compute]],
    placement: Placement,
    durations: Durations | Callable[[int, Compute], float] = Durations(),
    transfer_seconds: float = 0.0,
) -> list[Interval]:
    """All computations of one step, rank by rank, each as soon as its rank is free and what it needs is made.

    orders: of each rank. durations: of all alike, or that of each by its rank. transfer_seconds: from a rank
    to another, in the same unit. Raises ValueError where ranks wait for each other for ever.
    """
    ends: dict[Tensor, float] = {}
    intervals: list[list[Interval]] = [[] for _ in orders]

    def duration(rank: int, action: Compute) -> float:
        if isinstance(durations, Durations):
            return durations.of(action) / placement.num_chunks
        return durations(rank, action)

    def ready_at(action: Compute, stage: int) -> float | None:
        """When what an action needs is made; None: not yet known."""
        last = placement.num_stages - 1
        needed: Tensor = ("gradient", action.micro_batch, stage + 1)
        if isinstance(action, Forward):
            needed = ("activation", action.micro_batch, stage - 1)
        elif isinstance(action, BackwardWeight):
            needed = ("gradient", action.micro_batch, stage)
        elif stage == last:
            needed = ("activation", action.micro_batch, stage)
        if isinstance(action, Forward) and stage == 0:
            return 0.0
        made_at, (maker, _) = ends.get(needed), placement.holder(needed[2])
        if made_at is None or maker == placement.holder(stage)[0]:
            return made_at
        return made_at + transfer_seconds

    def advance(rank: int) -> bool:
        """Compute what comes next on a rank, if it is ready."""
        done = intervals[rank]
        if len(done) == len(orders[rank]):
            return False
        action = orders[rank][len(done)]
        stage = placement.stage(rank, action.chunk)
        ready = ready_at(action, stage)
        if ready is None:
            return False
        start = max(ready, done[-1].end if done else 0.0)
        done.append(Interval(start, start + duration(rank, action), rank, action))
        tensor = made(action, stage)
        if tensor is not None:
            ends[tensor] = done[-1].end
        return True

    while any(advance(rank) for rank in range(len(orders))):
        pass
    stuck = [f"rank {rank}" for rank, done in enumerate(intervals) if len(done) < len(orders[rank])]
    if stuck:
        raise ValueError(f"{', '.join(stuck)} wait for each other")
    return [interval for done in intervals for interval in done]


def idle(intervals: Sequence[Interval], rank: int) -> float:
    """How long a rank waits until all are done."""
    busy = sum(interval.end - interval.start for interval in intervals if interval.rank == rank)
    return max(interval.end for interval in intervals) - busy


def bubble_fraction(intervals: Sequence[Interval]) -> float:
    """The share of all ranks' time in which they wait."""
    num_ranks = 1 + max(interval.rank for interval in intervals)
    waiting = sum(idle(intervals, rank) for rank in range(num_ranks))
    return waiting / (num_ranks * max(interval.end for interval in intervals))


def mean_durations(intervals: Sequence[Interval], num_chunks: int) -> Durations:
    """What each kind took on the average of all ranks; half of a whole backward is for inputs."""

    def of(kind: type) -> float:
        found = [i.end - i.start for i in intervals if type(i.action) is kind]
        return num_chunks * sum(found) / len(found) if found else 0.0

    half = of(Backward) / 2
    return Durations(of(Forward), of(BackwardInput) + half, of(BackwardWeight) + half)


def replay(
    intervals: Sequence[Interval], orders: Sequence[Sequence[Compute]], placement: Placement
) -> list[Interval]:
    """The same computations, each as long as it was, if transfers took no time."""
    took = {(i.rank, i.action): i.end - i.start for i in intervals}
    return play(orders, placement, lambda rank, action: took[rank, action])
