"""How long the ranks of a pipeline wait in a step: played from the schedule's own lists (no torch)."""

from collections.abc import Sequence
from dataclasses import dataclass

from megalite.pipeline.actions import Backward, BackwardInput, BackwardWeight, Compute, Forward
from megalite.pipeline.schedule import orders_of
from megalite.pipeline.timeline import play


@dataclass(frozen=True)
class StageCosts:
    """Seconds of one micro batch, by stage: forward, backward for the input, backward for the weights."""

    forward: Sequence[float]
    backward_input: Sequence[float]
    backward_weight: Sequence[float]

    def of(self, action: Compute, stage: int) -> float:
        """Of an action on a stage."""
        if isinstance(action, Forward):
            return self.forward[stage]
        weight = self.backward_weight[stage]
        if isinstance(action, BackwardWeight):
            return weight
        assert isinstance(action, Backward | BackwardInput)
        return self.backward_input[stage] + (weight if isinstance(action, Backward) else 0.0)


@dataclass(frozen=True)
class Played:
    """A step's computations: its length, and the time in which each rank computes, in seconds."""

    seconds: float
    busy_seconds: tuple[float, ...]

    def waiting_seconds(self, rank: int) -> float:
        """Of a rank."""
        return self.seconds - self.busy_seconds[rank]

    @property
    def bubble_fraction(self) -> float:
        """The share of all ranks' time in which they wait."""
        return 1 - sum(self.busy_seconds) / (len(self.busy_seconds) * self.seconds)


def play_step(
    schedule: str,
    num_ranks: int,
    num_micro_batches: int,
    num_chunks: int,
    costs: StageCosts,
    transfer_seconds: float = 0.0,
) -> Played:
    """One step by the schedule's lists. costs: by stage; transfer_seconds: from a rank to another."""
    orders, placement = orders_of(schedule, num_ranks, num_micro_batches, num_chunks)

    def seconds(rank: int, action: Compute) -> float:
        return costs.of(action, placement.stage(rank, action.chunk))

    intervals = play(orders, placement, seconds, transfer_seconds)
    busy = [0.0] * num_ranks
    for start, end, rank, _ in intervals:
        busy[rank] += end - start
    return Played(max(interval.end for interval in intervals), tuple(busy))


def idle_seconds(
    schedule: str, num_ranks: int, num_chunks: int, forward: float, backward_input: float, weight: float
) -> float:
    """What each rank waits if all stages are alike: the published formulas, which cost nothing to evaluate.

    forward, backward_input, weight: of one micro batch through all chunks of a rank. Sources: Narayanan 2021
    (arXiv 2104.04473, section 2.2) for afab, 1f1b and interleaved; Qi 2023 (arXiv 2401.10241, table 1) for
    zb-h1, with weight <= forward, backward_input; Qi 2024 (arXiv 2405.15362) for zbv, with also forward <=
    backward_input and at least 2 p - 1 micro batches.
    """
    p, whole = num_ranks, forward + backward_input + weight
    formulas = {
        "afab": (p - 1) * whole,
        "1f1b": (p - 1) * whole,
        "interleaved": (p - 1) * whole / num_chunks,
        "zb-h1": (p - 1) * (forward + backward_input - weight),
        "zbv": (p - 1) * max(forward, backward_input) / 2,
    }
    return formulas[schedule]
