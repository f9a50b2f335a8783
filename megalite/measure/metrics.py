"""What is measured at each optimizer step: kept in metrics.jsonl, sent to TensorBoard, shown as progress."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalite.files import write_text
from megalite.measure.progress import Progress, rewards_in_words, seconds_in_words

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
TENSORBOARD_TAGS = {
    "loss": "loss/train",
    "validation_loss": "loss/validation",
    "grad_norm": "optimizer/grad_norm",
    "learning_rate": "optimizer/learning_rate",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "step_seconds": "speed/step_seconds",
}
EXPERT_TAGS = {  # of runs that have any
    "expert_largest_violation": "experts/largest_violation",
    "expert_bias_min": "experts/bias_min",
    "expert_bias_max": "experts/bias_max",
    "auxiliary_loss": "loss/auxiliary",
}


@dataclass(frozen=True)
class Workload:
    """What one optimizer step processes, and the speed of all devices of the job together."""

    samples_per_step: int
    tokens_per_sample: int
    flops_per_token: float
    peak_flops_per_second: float

    def speed(self, step_seconds: float) -> dict[str, float]:
        """Tokens per second, and MFU: the share of the peak that the model's own FLOPs use.

        Model FLOPs utilisation after PaLM (Chowdhery 2022, arXiv 2204.02311, appendix B): FLOPs that the
        model needs, without those that recomputation adds.
        """
        tokens_per_second = self.samples_per_step * self.tokens_per_sample / step_seconds
        mfu = tokens_per_second * self.flops_per_token / self.peak_flops_per_second
        return {"tokens_per_second": tokens_per_second, "mfu": mfu}


class Metrics:
    """The record of a run in its folder. Exists on the one rank that reports."""

    def __init__(
        self,
        run_dir: Path,
        workload: Workload,
        progress: Progress,
        *,
        last_step: int = 0,
        tensorboard: bool = True,
    ):
        """Continue after `last_step`: what was recorded of later steps will happen again, and is removed."""
        run_dir.mkdir(parents=True, exist_ok=True)
        cut_rows_after(run_dir / METRICS_FILE, last_step)
        self._run_dir, self._workload = run_dir, workload
        self._progress = progress
        self._file = open(run_dir / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115, closed by close()
        self._tensorboard = _open_tensorboard(run_dir, last_step) if tensorboard else None
        self._rows: list[dict[str, Any]] = []

    def record(
        self,
        *,
        step: int,
        loss: float,
        grad_norm: float,
        learning_rate: float,
        consumed_samples: int,
        step_seconds: float,
        expert_tokens: dict[int, list[int]] | None = None,
        **further: float | None,
    ) -> None:
        """Keep and show one optimizer step (1-based). Losses are in nats per token.

        consumed_samples: where the run stands in its data after the step; their tokens include padding.
        expert_tokens: layer -> tokens that chose each expert, where they are to be kept.
        further: numbers that not every step or run has, by name, such as `validation_loss`; None is left out.
        """
        row: dict[str, Any] = {
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "consumed_samples": consumed_samples,
            "consumed_tokens": consumed_samples * self._workload.tokens_per_sample,
            "step_seconds": step_seconds,
            **self._workload.speed(step_seconds),
        }
        assert not further.keys() & row.keys(), "a number has one name"
        row |= {name: number for name, number in further.items() if number is not None}
        row |= {} if expert_tokens is None else {"expert_tokens": expert_tokens}
        self._file.write(json.dumps(_without_nan(row)) + "\n")
        self._file.flush()
        if self._tensorboard:
            tags = TENSORBOARD_TAGS | EXPERT_TAGS | _more_tags(further)
            scalars = {tag: row[name] for name, tag in tags.items() if name in row}
            _write_scalars(self._tensorboard, step, scalars | _expert_scalars(expert_tokens or {}))
        self._rows.append(row)
        self._progress.show(row)

    def rewind(self, step: int) -> None:
        """Forget what came after a step, since it will come again."""
        self._file.close()
        cut_rows_after(self._run_dir / METRICS_FILE, step)
        self._file = open(self._run_dir / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115, closed by close()
        self._rows = [row for row in self._rows if row["step"] <= step]

    def summary(self) -> str:
        """One line on what was recorded since the start or the resumption."""
        if not self._rows:
            return "nothing was left to train"
        last = self._rows[-1]
        seconds = sum(row["step_seconds"] for row in self._rows)
        speed = self._workload.speed(seconds / len(self._rows))
        validated = next((row for row in reversed(self._rows) if "validation_loss" in row), None)
        validation = ""
        if validated:
            told = rewards_in_words(validated, "validation_")
            validation = f", validation loss {validated['validation_loss']:.4f}{told}"
        violation = last.get("expert_largest_violation")
        experts = "" if violation is None else f"expert violation {violation:.2f}, "
        steps = f"{len(self._rows)} step{'s' if len(self._rows) > 1 else ''}"
        return (
            f"trained {steps} in {seconds_in_words(seconds)}, {last['consumed_tokens']:,} tokens in all: "
            f"loss {last['loss']:.4f}{rewards_in_words(last)}{validation}, {experts}"
            f"{speed['tokens_per_second']:,.0f} tokens/s, MFU {speed['mfu']:.1%}"
        )

    def close(self) -> None:
        """Finish the files and the progress display."""
        self._progress.close()
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()


def cut_rows_after(file: Path, last_step: int) -> None:
    """Remove the rows of steps after `last_step`, and what a crash cut short: all at once."""
    if not file.exists():
        return
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= last_step]
    if kept != lines:
        write_text(file, "".join(kept))


def _step_of(line: str) -> float:
    """The step of a row; later than all others if the line is not a whole row."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no number that is none: null."""
    no_number = {name for name, value in row.items() if isinstance(value, float) and not isfinite(value)}
    return row | dict.fromkeys(no_number)


def _open_tensorboard(run_dir: Path, last_step: int) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter  # takes a second to import: only if it is wanted

    return SummaryWriter(log_dir=str(run_dir / TENSORBOARD_FOLDER), purge_step=last_step + 1)


def _more_tags(names: Iterable[str]) -> dict[str, str]:
    return {name: f"more/{name}" for name in names if name not in TENSORBOARD_TAGS | EXPERT_TAGS}


def _expert_scalars(tokens: dict[int, list[int]]) -> dict[str, float]:
    return {
        f"experts/layer_{layer}/tokens_of_{expert}": count
        for layer, counts in tokens.items()
        for expert, count in enumerate(counts)
    }


def _write_scalars(tensorboard: "SummaryWriter", step: int, scalars: dict[str, float]) -> None:
    for tag, value in scalars.items():
        tensorboard.add_scalar(tag, value, step)
    tensorboard.flush()
