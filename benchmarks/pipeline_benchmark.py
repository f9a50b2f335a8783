"""How long each of 4 ranks waits in a step of 8 micro batches, in seconds, with stages that sleep instead of
computing: 0.3 s for a forward through all chunks of a rank, for the gradient of the input, and for those of
the weights; from its recorded timeline, and the least of four steps, since other work on the machine only
adds. The plan is the planned timeline's, where transfers take no time.
"""

import time
from statistics import mean

import torch
import torch.distributed as dist

from benchmarks.measurement import Measurement
from benchmarks.world import in_world
from megalite.batch import Batch
from megalite.measure.recorder import HostClock, Recorder
from megalite.pipeline.orders import RULES
from megalite.pipeline.p2p import Peers
from megalite.pipeline.placement import Placement
from megalite.pipeline.runner import PipelineRunner
from megalite.pipeline.schedule import build_schedule, orders_of, placement_of
from megalite.pipeline.timeline import Interval, idle, play

TITLE = "Pipeline: waiting"
PEER = "plan"
RANKS, MICRO_BATCHES, STEPS = 4, 8, 4
UNIT_SECONDS = 0.3
SHAPE = (128, 1, 256)


class SleepingStage:
    """Chunks that add one."""

    def __init__(self, placement: Placement, rank: int) -> None:
        self.placement, self.rank = placement, rank

    def forward(self, x: torch.Tensor | None, batch: Batch, chunk: int) -> torch.Tensor:
        self._sleep(1)
        x = torch.zeros(SHAPE, requires_grad=True) if x is None else x
        is_last = self.placement.stage(self.rank, chunk) == self.placement.num_stages - 1
        return (x + 1).mean() if is_last else x + 1

    def backward(self, output: torch.Tensor, grad: torch.Tensor, chunk: int, *, is_last: bool) -> None:
        self._sleep(2)
        output.backward(grad)

    def backward_input(self, output: torch.Tensor, grad: torch.Tensor, chunk: int) -> None:
        self._sleep(1)
        output.backward(grad)

    def backward_weight(self, left: None, *, is_last: bool) -> None:
        self._sleep(1)

    def _sleep(self, units: int) -> None:
        time.sleep(units * UNIT_SECONDS / self.placement.num_chunks)


def computed(name: str) -> list[list[Interval]]:
    """By this rank, in each step; the ranks of a machine share their clock."""
    rank, placement = dist.get_rank(), placement_of(name, RANKS)
    stage = SleepingStage(placement, rank)
    head_rank, head_chunk = placement.holder(placement.num_stages - 1)
    peers = Peers(dist.group.WORLD, SHAPE, torch.float32, torch.device("cpu"))
    runner = PipelineRunner(stage, peers, loss_chunk=head_chunk if rank == head_rank else None)
    actions = build_schedule(name, rank, RANKS, MICRO_BATCHES)
    batches = [Batch(torch.zeros(1, 1, dtype=torch.int64))] * MICRO_BATCHES
    steps = []
    for _ in range(STEPS):
        recorder: Recorder = Recorder(HostClock())
        dist.barrier()
        runner.train(actions, batches, torch.tensor(1.0), recorder)
        computations = [note for note in recorder.noted() if note.lane == "compute"]
        steps.append([Interval(n.begin_seconds, n.end_seconds, rank, n.what) for n in computations])
    return steps


def computed_by_all() -> list[list[list[Interval]]]:
    """By schedule."""
    return [computed(name) for name in RULES]


def waiting_seconds(step: list[Interval]) -> list[float]:
    """Of each rank, between the first computation of all and the last."""
    first = min(interval.start for interval in step)
    step = [interval._replace(start=interval.start - first, end=interval.end - first) for interval in step]
    return [idle(step, rank) for rank in range(RANKS)]


def measure() -> list[Measurement]:
    """Every schedule, the mean over ranks."""
    recorded = zip(*in_world(RANKS, computed_by_all), strict=True)
    results = []
    for name, by_rank in zip(RULES, recorded, strict=True):
        steps = [[i for rank in ranks for i in rank] for ranks in zip(*by_rank, strict=True)]
        seconds = map(min, zip(*map(waiting_seconds, steps), strict=True))
        intervals = play(*orders_of(name, RANKS, MICRO_BATCHES))
        planned = UNIT_SECONDS * mean(idle(intervals, rank) for rank in range(RANKS))
        results.append(Measurement(name, "s", mean(seconds), planned, higher_is_better=False))
    return results
