"""What was measured of a model: a table for people, JSON for programs."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megalite.error import UserError
from megalite.files import write_text

FORMAT_VERSION = 1
HEADINGS = ("task", "few-shot", "metric", "value", "standard error", "samples")


class EvaluationError(UserError):
    """A model, a task or a record that cannot serve."""


@dataclass(frozen=True)
class Measurement:
    """One number.

    Attributes:
        task: of the harness, or the prefix of a token file.
        metric, value: what it is, in the units of the metric.
        standard_error: of the value; None where it is not known.
        num_fewshot: solved examples in each prompt; None where there is no prompt.
        num_samples: examples or documents that it was taken over; None where it is not known.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None = None
    num_fewshot: int | None = None
    num_samples: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """The measurements of one command.

    Attributes:
        origin: where the model came from: `path`, and of a checkpoint `step` and `manifest_sha256`.
        settings: what else decides the numbers: number format, limit, context and so on.
        versions: of the packages that took part.
    """

    origin: Mapping[str, Any]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    measurements: Sequence[Measurement]

    def save(self, path: Path) -> None:
        """Write the JSON; what stood there before is replaced at once."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Evaluation":
        """Raises EvaluationError when the file is not one that `save` wrote."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            if fields.pop("format_version") != FORMAT_VERSION:
                raise ValueError("another format version")
            rows = [Measurement(**row) for row in fields.pop("measurements")]
            return cls(**fields, measurements=rows)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{path} is not a record of tools/evaluate.py ({error})"
            raise EvaluationError(f"{reason}: move it away, or evaluate again") from None


def format_table(measurements: Iterable[Measurement]) -> str:
    """A Markdown table, one row a number."""
    rows = [HEADINGS, *(cells_of(measurement) for measurement in measurements)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def cells_of(row: Measurement) -> tuple[str, ...]:
    """A row of a table, under HEADINGS."""
    error = "" if row.standard_error is None else f"{row.standard_error:.4f}"
    fewshot, samples = ("" if n is None else f"{n:,}" for n in (row.num_fewshot, row.num_samples))
    value = f"{row.value:.4f}" if abs(row.value) < 1e6 else f"{row.value:.4g}"
    return row.task, fewshot, row.metric, value, error, samples
