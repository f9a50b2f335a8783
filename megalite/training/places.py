"""Where a rank can be in a job, and how long it may stay: what the watch is told of training."""

from enum import StrEnum
from math import inf
from pathlib import Path

from megalite.config.run import RunConfig
from megalite.config.watch import WatchConfig
from megalite.watch.limits import Limit
from megalite.watch.marks import Marks
from megalite.watch.witness import HangWatch


class Place(StrEnum):
    """A place, in the words in which people are told of it."""

    START_UP = "start-up"
    FIRST_STEP = "first step"  # it compiles, allocates and connects
    READING = "reading data"
    PASSES = "forward and backward"
    OPTIMIZER = "optimizer"
    VALIDATION = "validation"
    EVALUATION = "evaluation"
    SAVING = "saving"
    ENDING = "ending"


# Where a rank waits for others, whatever the reason: FILE:FUNCTION.
WAITS_IN = (
    "/torch/distributed/",
    "/deepspeed/comm/",
    "/deepspeed/runtime/zero/partition_parameters.py:wait",
    "/megalite/pipeline/p2p.py:",
    "/megalite/parallel/mappings.py:wait_for",
    "/megalite/parallel/node_memory.py:_listen",
)


def hang_watch(run: RunConfig, marks: Marks) -> HangWatch:
    """What the watch of a run goes by."""
    folder = Path(run.output_dir) / "stacks"
    return HangWatch(marks, limits_of(run.watch), folder, WAITS_IN)


def limits_of(watch: WatchConfig) -> dict[str, Limit]:
    """What each place allows.

    Until the first step is done nothing is known of the run, and code that prepares data may hold Python's
    lock for long: silence is then allowed as long as start-up is.
    """
    silent = _seconds(watch.stopped_seconds), "watch.stopped_seconds"
    start_up = _seconds(watch.start_up_seconds), "watch.start_up_seconds"
    at_start = Limit(*start_up, *max(start_up, silent))
    step = Limit(_seconds(watch.step_seconds), "watch.step_seconds", *silent, watch.factor)
    saving = Limit(_seconds(watch.saving_seconds), "watch.saving_seconds", *silent, watch.factor)
    evaluation = Limit(_seconds(watch.evaluation_seconds), "watch.evaluation_seconds", *silent, watch.factor)
    return {
        Place.START_UP: at_start,
        Place.FIRST_STEP: at_start,
        Place.READING: step,
        Place.PASSES: step,
        Place.OPTIMIZER: step,
        Place.VALIDATION: evaluation,
        Place.EVALUATION: evaluation,
        Place.SAVING: saving,
        Place.ENDING: saving,
    }


def _seconds(setting: float) -> float:
    return setting or inf
