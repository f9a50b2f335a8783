"""When a run was started, and from which step: TensorBoard's files of it say so, one for each start."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from megalite.measure.metrics import TENSORBOARD_FOLDER


class Start(NamedTuple):
    """One start of a job. step: the last that was there before."""

    step: int
    at_seconds: float


def starts_of(run_dir: Path) -> list[Start]:
    """The starts of a run in their order, empty where TensorBoard was off (logging.tensorboard)."""
    files = sorted((run_dir / TENSORBOARD_FOLDER).glob("events.out.tfevents.*"))
    return sorted((start for file in files for start in _start(file)), key=lambda start: start.at_seconds)


def _start(file: Path) -> Iterator[Start]:
    """Of one file; none of one that a crash left without its first records.

    SummaryWriter(purge_step=N) begins a file with a session's start at step N, from which it counts anew.
    """
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    for event in islice(EventFileLoader(str(file)).Load(), 3):
        if event.HasField("session_log"):
            yield Start(event.step - 1, event.wall_time)
