"""Draw a pipeline schedule as a timeline: which rank computes what, and where it waits."""

import argparse
import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from megalite.error import UserError, run_command
from megalite.measure.figure import save_figure
from megalite.pipeline.actions import WORDS, Backward, BackwardInput, BackwardWeight, Forward
from megalite.pipeline.orders import RULES
from megalite.pipeline.schedule import orders_of
from megalite.pipeline.timeline import Interval, bubble_fraction, play

FILL = {Forward: "#c6dbef", Backward: "#fdd0a2", BackwardInput: "#fdd0a2", BackwardWeight: "#c7e9c0"}
EDGE = {Forward: "#2563a8", Backward: "#c2571a", BackwardInput: "#c2571a", BackwardWeight: "#2e7d32"}
NAMES = {
    "1f1b": "one forward, one backward (1F1B)",
    "afab": "all forward, all backward (GPipe)",
    "interleaved": "interleaved 1F1B",
    "zb-h1": "split backward (ZB-H1)",
    "zbv": "split backward, chunks as a V (ZBV)",
}
ROW_HEIGHT = 0.86


def draw(intervals: list[Interval], title: str) -> Figure:
    """One row per rank, the first on top; times in units of one forward."""
    num_ranks = 1 + max(interval.rank for interval in intervals)
    end = max(interval.end for interval in intervals)
    width = min(24.0, max(9.0, 1.5 + 0.34 * end))
    figure = Figure(figsize=(width, 1.5 + 0.5 * num_ranks), layout="constrained")
    axes = figure.subplots()
    shortest = min(interval.end - interval.start for interval in intervals)
    font_points = max(4.0, min(10.0, 23 * width * min(1.0, 1.5 * shortest) / end))
    draw_ranks(axes, intervals, font_points)
    axes.set_xlim(0, end)
    axes.set_xlabel("time, in units of one forward")
    axes.set_title(title, loc="left", fontsize=11)
    explain(figure, intervals)
    return figure


def draw_ranks(axes: Axes, intervals: list[Interval], font_points: float) -> None:
    """A row of boxes for each rank, numbered by micro batch."""
    num_ranks = 1 + max(interval.rank for interval in intervals)
    axes.set_facecolor("#f1f1f1")
    for start, stop, rank, action in intervals:
        corner, kind = (start, rank - ROW_HEIGHT / 2), type(action)
        shade = FILL[kind] if action.chunk % 2 == 0 else _darker(FILL[kind])
        box = Rectangle(corner, stop - start, ROW_HEIGHT, facecolor=shade, edgecolor=EDGE[kind], lw=0.8)
        axes.add_patch(box)
        place, number = ((start + stop) / 2, rank), str(action.micro_batch)
        axes.text(*place, number, ha="center", va="center_baseline", fontsize=font_points)
    axes.set_ylim(num_ranks - 0.5, -0.5)
    axes.set_yticks(range(num_ranks), [f"rank {rank}" for rank in range(num_ranks)])
    axes.tick_params(left=False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def explain(figure: Figure, intervals: list[Interval]) -> None:
    """The legend, of what is in the picture."""
    drawn = {type(interval.action) for interval in intervals}
    kinds = [kind for kind in WORDS if kind in drawn]
    legend = [Patch(facecolor=FILL[kind], edgecolor=EDGE[kind], label=WORDS[kind]) for kind in kinds]
    if any(interval.action.chunk for interval in intervals):
        legend.append(Patch(facecolor=_darker("#dddddd"), edgecolor="#777777", label="dark: second chunk"))
    legend.append(Patch(facecolor="#f1f1f1", edgecolor="#bbbbbb", label="waiting"))
    figure.legend(handles=legend, loc="outside lower right", ncols=5, frameon=False, fontsize=9)


def _darker(colour: str) -> tuple[float, float, float]:
    red, green, blue = to_rgb(colour)
    return 0.8 * red, 0.8 * green, 0.8 * blue


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add, shown = parser.add_argument, "(default: %(default)s)"
    add("--pipeline-schedule", choices=sorted(RULES), default="1f1b", help="default: %(default)s")
    add("--pp-size", type=int, default=4, help=f"number of stages {shown}")
    add("--num-micro-batches", type=int, default=8, help=f"micro batches of one step {shown}")
    add("--num-chunks", type=int, help="chunks of layers per rank (default: the schedule's fewest)")
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
    intervals = play(*orders_of(name, stages, micro_batches, arguments.num_chunks))
    waiting = f"waiting {bubble_fraction(intervals):.1%} of the time"
    title = f"{NAMES[name]}: {stages} ranks, {micro_batches} micro batches, {waiting}"
    save_figure(draw(intervals, title), arguments.output, dots_per_inch=150)
    print(f"wrote {arguments.output}: {waiting}")


if __name__ == "__main__":
    sys.exit(main())
