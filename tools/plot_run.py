"""Draw a run, from its metrics.jsonl: loss, gradient norm, learning rate, speed, rewards, and evaluations.

A run with experts becomes a second picture: how busy each expert of each layer was, and their balance.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from megalite.error import UserError, run_command
from megalite.measure.expert_load import expert_loads
from megalite.measure.figure import save_figure
from megalite.measure.metrics import METRICS_FILE

REQUIRED = ("step", "loss", "grad_norm", "learning_rate", "tokens_per_second")
BLUE, ORANGE, GREY = "#2563a8", "#d9661f", "#666666"
EVALUATION = "evaluation/"  # prefix of TASK/METRIC in a row
MOST_MAPS_ABREAST = 6


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
    """One figure with four panels over the optimizer steps; two more for pairs, one for each task."""
    paired = [row for row in rows if "rewards/margins" in row]
    tasks = sorted({name.split("/")[1] for row in rows for name in row if name.startswith(EVALUATION)})
    more: list[Callable[[Axes], None]] = [partial(_draw_task, task=task, rows=rows) for task in tasks]
    if paired:
        more = [partial(_draw_rewards, rows=paired), partial(_draw_accuracies, rows=paired), *more]
    num_lines = 2 + ceil(len(more) / 2)
    figure = Figure(figsize=(11, 3.5 * num_lines), layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    loss, grad_norm, learning_rate, speed, *others = figure.subplots(num_lines, 2, sharex=True).flat
    for axes, draw_panel in zip(others, more, strict=False):
        draw_panel(axes)
    for axes in others[len(more) :]:
        axes.set_axis_off()
    _curve(loss, f"Loss (nats per {'pair' if paired else 'token'})", rows, "loss", label="train")
    _validated(loss, rows, "loss")
    _curve(grad_norm, "Gradient norm, before clipping", rows, "grad_norm")
    _curve(learning_rate, "Learning rate", rows, "learning_rate", raw_only=True)
    learning_rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    _curve(speed, "Tokens per second", rows, "tokens_per_second")
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in (grad_norm, learning_rate, speed):
        axes.set_ylim(bottom=0)
    for axes in (others or [loss, grad_norm, learning_rate, speed])[-2:]:
        axes.set_xlabel("optimizer step", color=GREY)
    return figure


def _validated(axes: Axes, rows: list[dict[str, Any]], name: str) -> None:
    """What validation made of a number, where there was any, and which curve is which."""
    validated = [row for row in rows if f"validation_{name}" in row]
    if validated:
        steps, values = _columns(validated, f"validation_{name}")
        axes.plot(steps, values, color=ORANGE, marker="o", markersize=4, linewidth=1.2, label="validation")
        axes.legend(frameon=False)


def _draw_rewards(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """The mean rewards of both answers of a pair; the space between them is the margin."""
    steps, chosen = _columns(rows, "rewards/chosen")
    _, rejected = _columns(rows, "rewards/rejected")
    axes.fill_between(steps, rejected, chosen, color=GREY, alpha=0.15, label="margin")
    axes.plot(steps, chosen, color=BLUE, linewidth=1.5, label="chosen")
    axes.plot(steps, rejected, color=ORANGE, linewidth=1.5, label="rejected")
    axes.legend(frameon=False)
    _dress(axes, "Reward of each answer")


def _draw_accuracies(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Of how many pairs the chosen answer has the larger reward."""
    title = "Share of pairs whose chosen answer has the larger reward"
    _curve(axes, title, rows, "rewards/accuracies", label="train")
    _validated(axes, rows, "rewards/accuracies")
    axes.set_ylim(0, 1.05)


def _draw_task(axes: Axes, task: str, rows: list[dict[str, Any]]) -> None:
    """All metrics of one task of lm-evaluation-harness."""
    prefix = f"{EVALUATION}{task}/"
    names = sorted({name for row in rows for name in row if name.startswith(prefix)})
    for name in names:
        steps, values = _columns([row for row in rows if name in row], name)
        axes.plot(steps, values, marker="o", markersize=4, linewidth=1.2, label=name.removeprefix(prefix))
    axes.legend(frameon=False)
    _dress(axes, f"Evaluation: {task}")


def draw_experts(rows: list[dict[str, Any]], title: str) -> Figure:
    """One figure: on top the balance of the whole model, below a map of each layer's experts.

    Raises ExpertLoadError in one line where the rows do not tell of the same experts.
    """
    edges, loads = expert_loads([row for row in rows if "expert_tokens" in row])
    abreast = min(MOST_MAPS_ABREAST, ceil(1.3 * sqrt(len(loads))))
    num_lines = ceil(len(loads) / abreast)
    maps_inches = num_lines * max(1.35, 2.9 - 0.5 * num_lines)
    figure = Figure(figsize=(11, 3 + maps_inches), layout="constrained")
    figure.suptitle(f"{title}: experts", fontsize=13, fontweight="bold")
    top, bottom = figure.subfigures(2, 1, height_ratios=[2.4, maps_inches], squeeze=False).flat
    _draw_balance(top, [row for row in rows if "expert_largest_violation" in row])
    _draw_maps(bottom, edges, loads, num_lines)
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of the run, with metrics.jsonl")
    parser.add_argument("--output", type=Path, help="picture to write (default: RUN_DIR/metrics.png)")
    parser.add_argument(
        "--experts-output", type=Path, help="picture of its experts, if any (default: RUN_DIR/experts.png)"
    )
    arguments = parser.parse_args(argv)
    output = arguments.output or arguments.run_dir / "metrics.png"
    experts_output = arguments.experts_output or arguments.run_dir / "experts.png"
    return run_command(lambda: plot(arguments.run_dir, output, experts_output))


def plot(run_dir: Path, output: Path, experts_output: Path) -> None:
    """Draw the run in `run_dir` to the picture `output`, and its experts, if any, to `experts_output`."""
    rows, name = read_rows(run_dir), run_dir.resolve().name
    pictures = [(draw(rows, name), output)]
    if any("expert_tokens" in row for row in rows):
        pictures.append((draw_experts(rows, name), experts_output))
    for figure, path in pictures:
        save_figure(figure, path, dots_per_inch=150)
    written = " and ".join(str(path) for _, path in pictures)
    print(f"wrote {written}: {len(rows)} steps, last loss {rows[-1]['loss']:.4f}")


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
    _dress(axes, title)


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(alpha=0.25)
    axes.tick_params(colors=GREY)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_balance(figure: SubFigure, rows: list[dict[str, Any]]) -> None:
    """How far the busiest expert is above its share, and how far the biases went."""
    violation, bias = figure.subplots(1, 2, sharex=True)
    _curve(violation, "Largest violation: busiest expert's load - 1", rows, "expert_largest_violation")
    violation.set_yscale("log")
    violation.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    violation.yaxis.set_minor_locator(NullLocator())
    violation.yaxis.set_major_formatter("{x:g}")
    steps, least = _columns(rows, "expert_bias_min")
    _, largest = _columns(rows, "expert_bias_max")
    bias.fill_between(steps, least, largest, color=BLUE, alpha=0.2)
    for values in (least, largest):
        bias.plot(steps, values, color=BLUE, linewidth=1.5)
    _dress(bias, "Selection biases, from the least to the largest")
    for axes in (violation, bias):
        axes.set_xlabel("optimizer step", color=GREY)


def _draw_maps(figure: SubFigure, edges: np.ndarray, loads: dict[int, np.ndarray], num_lines: int) -> None:
    """A map for each layer: columns of steps, a row for each expert, its load as the colour."""
    figure.suptitle("Load of each expert: its tokens / mean of its layer", fontsize=10, x=0.01, ha="left")
    abreast = ceil(len(loads) / num_lines)
    grid = figure.subplots(num_lines, abreast, sharex=True, sharey=True, squeeze=False)
    for axes, (layer, load) in zip(grid.flat, loads.items(), strict=False):
        rows = np.arange(len(load) + 1) - 0.5
        mesh = axes.pcolormesh(edges, rows, load, cmap="RdBu_r", vmin=0, vmax=2, rasterized=True)
        axes.set_title(f"layer {layer}", loc="left", fontsize=9)
        axes.tick_params(colors=GREY, labelsize=8)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(8 // abreast + 1, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in grid.flat[len(loads) :]:
        axes.set_axis_off()
    for axes in grid.flat[len(loads) - abreast : len(loads)]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
    bar = figure.colorbar(mesh, ax=grid, extend="max", pad=0.01, aspect=40)
    bar.set_label("load, 1 = balance", color=GREY)
    bar.ax.tick_params(colors=GREY)
    figure.supxlabel("optimizer step", fontsize=10, color=GREY)
    figure.supylabel("expert", fontsize=10, color=GREY)


if __name__ == "__main__":
    sys.exit(main())
