"""Draw the curves of a run, from its metrics.jsonl: loss, gradient norm, learning rate and speed."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from megalite.error import UserError, run_command
from megalite.measure.figure import save_figure
from megalite.measure.metrics import METRICS_FILE

REQUIRED = ("step", "loss", "grad_norm", "learning_rate", "tokens_per_second")
BLUE, ORANGE, GREY = "#2563a8", "#d9661f", "#666666"


class PlotError(UserError):
    """The run has nothing that can be drawn."""


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, in order of steps. Raises PlotError in one line if there are none."""
    path = run_dir / METRICS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PlotError(f"cannot read {path} ({error}): give the folder that a run wrote") from error
    rows = [_parse(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise PlotError(f"{path} is empty: the run has not taken a step yet")
    return sorted(rows, key=lambda row: row["step"])


def draw(rows: list[dict[str, Any]], title: str) -> Figure:
    """One figure with four panels over the optimizer steps."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    loss, grad_norm, learning_rate, speed = figure.subplots(2, 2, sharex=True).flat
    _curve(loss, "Loss (nats per token)", rows, "loss", label="train")
    validated = [row for row in rows if row.get("validation_loss") is not None]
    if validated:
        steps, values = _columns(validated, "validation_loss")
        loss.plot(steps, values, color=ORANGE, marker="o", markersize=4, linewidth=1.2, label="validation")
        loss.legend(frameon=False)
    _curve(grad_norm, "Gradient norm, before clipping", rows, "grad_norm")
    _curve(learning_rate, "Learning rate", rows, "learning_rate", raw_only=True)
    learning_rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    _curve(speed, "Tokens per second", rows, "tokens_per_second")
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in (grad_norm, learning_rate, speed):
        axes.set_ylim(bottom=0)
    for axes in (learning_rate, speed):
        axes.set_xlabel("optimizer step", color=GREY)
    return figure


def smoothed(values: list[float], window_steps: float) -> list[float]:
    """Exponential moving average over about `window_steps` values, free of the bias of its start."""
    decay = 1 - 1 / max(1.0, window_steps)
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        means.append(total / weight)
    return means


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of the run, with metrics.jsonl")
    parser.add_argument("--output", type=Path, help="picture to write (default: RUN_DIR/metrics.png)")
    arguments = parser.parse_args(argv)
    output = arguments.output or arguments.run_dir / "metrics.png"
    return run_command(lambda: plot(arguments.run_dir, output))


def plot(run_dir: Path, output: Path) -> None:
    """Draw the curves of the run in `run_dir` to the picture `output`."""
    rows = read_rows(run_dir)
    save_figure(draw(rows, run_dir.resolve().name), output, dots_per_inch=150)
    print(f"wrote {output}: {len(rows)} steps, last loss {rows[-1]['loss']:.4f}")


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        missing = [name for name in REQUIRED if not isinstance(row[name], int | float)]
    except (ValueError, KeyError, TypeError) as error:
        needed = ", ".join(REQUIRED)
        raise PlotError(f"{path}, line {number}: not a row of metrics with {needed}") from error
    if missing:
        raise PlotError(f"{path}, line {number}: {', '.join(missing)} is not a number")
    return row


def _columns(rows: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    return [row["step"] for row in rows], [row[name] for row in rows]


def _curve(
    axes: Axes,
    title: str,
    rows: list[dict[str, Any]],
    name: str,
    label: str | None = None,
    raw_only: bool = False,
) -> None:
    """The values, pale, under their moving average; alone where an average would mislead."""
    steps, values = _columns(rows, name)
    if raw_only or len(rows) < 20:
        axes.plot(
            steps, values, color=BLUE, linewidth=1.5, label=label, marker="." if len(rows) < 20 else None
        )
    else:
        axes.plot(steps, values, color=BLUE, linewidth=0.8, alpha=0.35)
        axes.plot(steps, smoothed(values, max(5, len(rows) / 100)), color=BLUE, linewidth=1.5, label=label)
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(alpha=0.25)
    axes.tick_params(colors=GREY)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


if __name__ == "__main__":
    sys.exit(main())
