"""Draw a pipeline schedule as a timeline: which stage computes what, and where it waits."""

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from megalite.error import UserError, run_command
from megalite.measure.figure import save_figure
from megalite.pipeline.schedule import SCHEDULES
from megalite.pipeline.timeline import Interval, bubble_fraction, timeline

FILL = {"forward": "#c6dbef", "backward": "#fdd0a2"}
EDGE = {"forward": "#2563a8", "backward": "#c2571a"}
NAMES = {"1f1b": "one forward, one backward (1F1B)", "afab": "all forward, all backward (GPipe)"}
ROW_HEIGHT = 0.86


def draw(intervals: list[Interval], title: str) -> Figure:
    """One row per stage, the first on top; times in units of one forward."""
    num_stages = 1 + max(interval.stage for interval in intervals)
    end = max(interval.end for interval in intervals)
    width = min(24.0, max(9.0, 1.5 + 0.34 * end))
    figure = Figure(figsize=(width, 1.5 + 0.5 * num_stages), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("#f1f1f1")
    font_points = max(4.0, min(10.0, 23 * width / end))
    for start, stop, stage, kind, micro_batch in intervals:
        corner = (start, stage - ROW_HEIGHT / 2)
        box = Rectangle(corner, stop - start, ROW_HEIGHT, facecolor=FILL[kind], edgecolor=EDGE[kind], lw=0.8)
        axes.add_patch(box)
        middle = (start + stop) / 2
        axes.text(middle, stage, str(micro_batch), ha="center", va="center_baseline", fontsize=font_points)
    axes.set_xlim(0, end)
    axes.set_ylim(num_stages - 0.5, -0.5)
    axes.set_yticks(range(num_stages), [f"stage {stage}" for stage in range(num_stages)])
    axes.set_xlabel("time, in units of one forward")
    axes.set_title(title, loc="left", fontsize=11)
    axes.tick_params(left=False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    legend = [Patch(facecolor=FILL[kind], edgecolor=EDGE[kind], label=kind) for kind in FILL]
    legend.append(Patch(facecolor="#f1f1f1", edgecolor="#bbbbbb", label="waiting"))
    figure.legend(handles=legend, loc="outside lower right", ncols=3, frameon=False, fontsize=9)
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add, shown = parser.add_argument, "(default: %(default)s)"
    add("--pipeline-schedule", choices=sorted(SCHEDULES), default="1f1b", help="default: %(default)s")
    add("--pp-size", type=int, default=4, help=f"number of stages {shown}")
    add("--num-micro-batches", type=int, default=8, help=f"micro batches of one step {shown}")
    add("--output", type=Path, default=Path("schedule.png"), help=f"picture to write {shown}")
    arguments = parser.parse_args(argv)
    return run_command(lambda: draw_schedule(arguments))


def draw_schedule(arguments: argparse.Namespace) -> None:
    """Draw what the arguments ask for. Raises UserError when it has no stage, or no micro batch."""
    name, stages, micro_batches = arguments.pipeline_schedule, arguments.pp_size, arguments.num_micro_batches
    if stages < 1:
        raise UserError(f"a pipeline of {stages} stages computes nothing: give --pp-size at least 1")
    if micro_batches < 1:
        raise UserError(f"a step of {micro_batches} micro batches: give --num-micro-batches at least 1")
    intervals = timeline(name, stages, micro_batches)
    waiting = f"waiting {bubble_fraction(intervals):.1%} of the time"
    title = f"{NAMES[name]}: {stages} stages, {micro_batches} micro batches, {waiting}"
    save_figure(draw(intervals, title), arguments.output, dots_per_inch=150)
    print(f"wrote {arguments.output}: {waiting}")


if __name__ == "__main__":
    sys.exit(main())
