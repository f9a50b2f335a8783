"""A step recorded on ranks whose clocks are apart lies on the clock of the first."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalite.measure.timeline import read_timelines
from megalite.parallel.context import ParallelContext
from megalite.parallel.topology import Topology
from megalite.training.timeline import StepTimeline
from tests.harness import run_distributed

AHEAD_SECONDS = 1000.0  # of a rank's clock, times its number
STEP = 3


def record_three_steps(rank: int, folder: Path) -> None:
    """In each a computation on rank 0, and then one on rank 1, with a sum after each."""
    real = time.perf_counter
    time.perf_counter = lambda: real() + AHEAD_SECONDS * rank  # in this process alone
    context = ParallelContext.build(Topology(2), rank, torch.device("cpu"))
    record_step = StepTimeline(STEP, folder, context, {"run": "a test"})
    for step in range(1, 4):
        with record_step(step) as record:
            for turn in range(2):
                if turn == rank:
                    with record("update", None):
                        time.sleep(0.05)
                dist.all_reduce(torch.ones(()))
        assert bool(list(folder.glob("timeline-*.json"))) == (step == STEP)


@pytest.fixture(scope="module")
def timelines(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("timelines")
    run_distributed(record_three_steps, 2, folder)
    return read_timelines(folder)


def test_what_followed_on_another_rank_follows_in_the_record(timelines):
    [first], [second] = (timeline.lane("update") for timeline in timelines)
    error = sum(timeline.facts["clock_error_seconds"] for timeline in timelines)
    assert error < 1
    assert first.end_seconds - error <= second.begin_seconds < first.end_seconds + 30
    assert first.seconds >= 0.05 and second.seconds >= 0.05
    assert 0 <= first.begin_seconds < 30


def test_collectives_lie_on_the_same_clock_as_what_is_between_them(timelines):
    for rank, timeline in enumerate(timelines):
        [update], sums = timeline.lane("update"), timeline.lane("collective")
        assert [span.name for span in sums] == ["gloo:all_reduce"] * 2
        assert (sums[0].begin_seconds < update.begin_seconds) == (rank == 1)
        assert update.end_seconds < sums[1].begin_seconds + 0.01
        assert timeline.facts["run"] == "a test"
