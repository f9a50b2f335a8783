"""What a real run says of its plan: how far the prediction was off, and the efficiency that makes it right.

Read from metrics.jsonl in RUN_DIR, and from the recorded timeline if there is one. No torch.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from megalite.config.device import DeviceConfig
from megalite.error import UserError
from megalite.measure.timeline import OVERLAPPING, RankTimeline, found_timelines
from megalite.plan.job import Job
from megalite.plan.layout import check_stages
from megalite.plan.step_time import StepTime, step_time

METRICS_FILE = "metrics.jsonl"
WARM_UP_STEPS = 2  # of a job: compilation, traces, first allocations
LEAST_EFFICIENCY, MOST_EFFICIENCY = 0.005, 1.0


@dataclass(frozen=True)
class Comparison:
    """A plan beside the run.

    Attributes:
        planned: the step by the device as it was given.
        measured_seconds: the median step of the run, of `num_steps` that count.
        device: with the efficiency that makes the plan right.
        measured_waiting, planned_waiting: the share of time in which ranks wait, None without a timeline.
    """

    planned: StepTime
    measured_seconds: float
    num_steps: int
    device: DeviceConfig
    measured_waiting: float | None = None
    planned_waiting: float | None = None

    @property
    def error(self) -> float:
        """How far the prediction was off, as a share of what was measured; positive: planned too long."""
        return self.planned.total / self.measured_seconds - 1


def compare_with_run(job: Job, run_dir: Path) -> Comparison:
    """Raises UserError, in one line: the run cannot be, has too few steps, or no efficiency explains them."""
    check_stages(job.run)
    seconds = measured_step_seconds(run_dir)
    planned, measured = step_time(job), statistics.median(seconds)
    device = fitted_device(job, measured)
    waiting = measured_waiting(run_dir)
    expected = planned.bubble_fraction if waiting is not None else None
    return Comparison(planned, measured, len(seconds), device, waiting, expected)


def measured_step_seconds(run_dir: Path) -> list[float]:
    """Of the steps of a run, those that warm up left out."""
    path = run_dir / METRICS_FILE
    if not path.exists():
        raise UserError(f"{path} is not there: --measure takes the folder of a run that has taken steps")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    seconds = [row["step_seconds"] for row in rows if "step_seconds" in row]
    if len(seconds) <= WARM_UP_STEPS:
        raise UserError(
            f"{path} has {len(seconds)} steps and {WARM_UP_STEPS} of them warm up: train {WARM_UP_STEPS + 1} "
            "or more"
        )
    return seconds[WARM_UP_STEPS:]


def fitted_device(job: Job, measured_seconds: float) -> DeviceConfig:
    """The device with the matmul_efficiency at which a step takes as long as measured."""
    low, high = LEAST_EFFICIENCY, MOST_EFFICIENCY
    fastest, slowest = (step_time(_with_efficiency(job, value)).total for value in (high, low))
    if not fastest <= measured_seconds <= slowest:
        raise UserError(
            f"a step took {measured_seconds:.3g} s and no efficiency explains it: {job.device.name} would "
            f"take {fastest:.3g} s at its peak: check --device, --nodes and --gpus-per-node"
        )

    def seconds(efficiency: float) -> float:
        return step_time(_with_efficiency(job, efficiency)).total

    return _with_efficiency(job, _bisect(seconds, measured_seconds, low, high)).device


def measured_waiting(run_dir: Path) -> float | None:
    """The share of the recorded step in which ranks wait; None where none is recorded.

    Raises TimelineError for a file that is no recording.
    """
    timelines = found_timelines(run_dir)
    return statistics.mean(map(_waiting_of, timelines)) if timelines else None


def _waiting_of(timeline: RankTimeline) -> float:
    """From the first to the last that the rank itself did; transfers and collectives go on besides."""
    own = [span for span in timeline.spans if span.lane not in OVERLAPPING] or timeline.spans
    begin, end = min(span.begin_seconds for span in own), max(span.end_seconds for span in own)
    return sum(span.seconds for span in timeline.lane("wait")) / (end - begin) if end > begin else 0.0


def _with_efficiency(job: Job, value: float) -> Job:
    return replace(job, device=job.device.model_copy(update={"matmul_efficiency": value}))


def _bisect(decreasing: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Where a decreasing function takes a value, to a part in 10,000."""
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if decreasing(middle) < wanted else (middle, high)
    return (low + high) / 2
