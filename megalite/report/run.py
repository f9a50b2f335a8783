"""All that a report reads of a run's folder, read once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megalite.checkpoint.load import checkpoints_at
from megalite.config.deepspeed import DeepSpeedConfig, load_deepspeed
from megalite.config.load import load_run
from megalite.config.run import RunConfig
from megalite.error import UserError
from megalite.evaluation.card import RECORDS
from megalite.evaluation.record import Evaluation
from megalite.inspection.contents import DEEPSPEED, read_rows
from megalite.inspection.inventory import Item, look_at
from megalite.measure.memory_table import RankMemory
from megalite.measure.metrics import METRICS_FILE
from megalite.measure.timeline import RankTimeline, found_timelines
from megalite.report.content import ReportError
from megalite.report.memory_file import read_memory
from megalite.report.starts import Start, starts_of

CONFIG = "config.yaml"
NOT_NUMBERS = ("expert_tokens",)  # of a row: layer -> tokens of its experts
T = TypeVar("T")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """What is known of a run.

    Attributes:
        name: for people, another one for each run of a page.
        folder: where it lies.
        rows: of metrics.jsonl, in the order of their steps; a number that is none is null.
        config, deepspeed: as they were resolved; None where the folder has none that can be read.
        checkpoints: that are kept, the oldest first.
        starts: of its jobs.
        evaluations: records of tools/evaluate.py, by the name of their files.
        memory: of each rank, from memory.json.
        timelines: recorded of a step, a rank each.
        missing: what could not be read, a line each.
    """

    name: str
    folder: Path
    rows: Sequence[Row]
    config: RunConfig | None = None
    deepspeed: DeepSpeedConfig | None = None
    checkpoints: Sequence[Item] = ()
    starts: Sequence[Start] = ()
    evaluations: Mapping[str, Evaluation] = field(default_factory=dict)
    memory: Sequence[RankMemory] = ()
    timelines: Sequence[RankTimeline] = ()
    missing: Sequence[str] = ()

    @property
    def newest(self) -> Item | None:
        """The newest checkpoint whose state can be read."""
        return next((item for item in reversed(self.checkpoints) if item.state), None)

    @property
    def num_ranks(self) -> int | None:
        """Of the job that wrote the newest checkpoint, or a timeline; None where neither is there."""
        manifest = self.newest.manifest if self.newest else None
        return (
            manifest.world_size
            if manifest
            else next((t.facts.get("world_size") for t in self.timelines), None)
        )

    @property
    def dp_size(self) -> int | None:
        """Ranks of the job that see other data."""
        if self.num_ranks is None or self.config is None:
            return None
        parallel = self.config.parallel
        return self.num_ranks // (parallel.tp_size * parallel.pp_size * parallel.cp_size)

    @property
    def num_micro_batches(self) -> int | None:
        """Of a step, on each of these ranks."""
        if self.deepspeed is None:
            return None
        if self.dp_size is None:
            return self.deepspeed.gradient_accumulation_steps
        return self.deepspeed.num_micro_batches(self.dp_size)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Each of these runs; ReportError in one line for a folder that is none, or that is named twice."""
    resolved = [folder.resolve() for folder in folders]
    for number, folder in enumerate(resolved):
        if folder in resolved[:number]:
            raise ReportError(f"{folders[number]} is given twice: name each run once")
    names = _names(resolved)
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def read_run(folder: Path, name: str) -> Run:
    """What is known of one run.

    Raises ReportError, or another UserError, in one line for a folder without metrics.jsonl, and for a row
    of it that is none. What else is missing or damaged is noted in `missing`.
    """
    missing: list[str] = []
    rows = numbered_rows(folder)
    no_timelines: list[RankTimeline] = []
    no_memory: list[RankMemory] = []
    return Run(
        name,
        folder,
        rows,
        config=_attempt(missing, lambda: load_run(str(_there(folder / CONFIG))), None),
        deepspeed=_attempt(missing, lambda: load_deepspeed(str(_there(folder / DEEPSPEED))), None),
        checkpoints=[look_at(path) for path in reversed(checkpoints_at(folder / "checkpoints"))],
        starts=starts_of(folder),
        evaluations=_attempt(missing, lambda: _evaluations(folder), {}),
        memory=_attempt(missing, lambda: read_memory(folder), no_memory),
        timelines=_attempt(missing, lambda: found_timelines(folder), no_timelines),
        missing=missing,
    )


def numbered_rows(folder: Path) -> list[Row]:
    """The rows of metrics.jsonl in the order of their steps; a last line in the making is left out."""
    path = folder / METRICS_FILE
    if not path.is_file():
        raise ReportError(f"{path}: No such file: give the folder that a run wrote")
    rows: list[Row] = [row for _, row in sorted(read_rows(folder).items())]
    if not rows:
        raise ReportError(f"{path} is empty: the run has not taken a step yet")
    for row in rows:
        wrong = [name for name, value in row.items() if not _is_number(value) and name not in NOT_NUMBERS]
        if wrong:
            raise ReportError(f"{path}, step {row['step']}: {wrong[0]} is not a number: remove the row")
    return rows


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _names(folders: Sequence[Path]) -> list[str]:
    """As short as they can be told apart: the last parts of their paths, from one on."""
    for length in range(1, max(len(folder.parts) for folder in folders)):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _there(path: Path) -> Path:
    if not path.is_file():
        raise ReportError(f"{path.name} is not in the folder")
    return path


def _attempt(missing: list[str], read: Callable[[], T], otherwise: T) -> T:
    """What is read; where it cannot be, why is noted."""
    try:
        return read()
    except UserError as error:
        missing.append(str(error))
        return otherwise


def _evaluations(folder: Path) -> dict[str, Evaluation]:
    return {file.name: Evaluation.read(file) for file in sorted(folder.glob(RECORDS))}
