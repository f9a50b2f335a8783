"""Draw the recorded timeline of a step beside the planned one, and say how long each rank waited."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from matplotlib.figure import Figure

from megalite.error import run_command
from megalite.measure.figure import save_figure
from megalite.measure.timeline import (
    RankTimeline,
    TimelineError,
    pipelines_of,
    read_timelines,
    write_merged,
)
from megalite.pipeline.actions import computation_of
from megalite.pipeline.orders import Order
from megalite.pipeline.placement import Placement
from megalite.pipeline.schedule import orders_of
from megalite.pipeline.timeline import Interval, idle, mean_durations, play, replay
from tools.draw_schedule import draw_ranks, explain

SIZES = ("pipeline_schedule", "pp_size", "num_micro_batches", "num_chunks")  # of the plan, as facts
PLANNED = (*SIZES, "clock_error_seconds")
HEADINGS = ("compute", "waits, measured", "without transfers", "planned", "optimizer", "in collectives")


EXPLANATION = """\
Record with logging.timeline_at_step. The table has, in seconds for each rank: what it computed; how long it
waited between the first and the last computation of its pipeline, as measured, as it would without the time
of transfers, and as planned, where also all ranks are equally fast; its optimizer; and, within what it
computed, how long layers waited for collectives."""


def planned_orders(pipeline: Sequence[RankTimeline]) -> tuple[list[Order], Placement]:
    """What each rank of a pipeline was to compute."""
    return orders_of(*(pipeline[0].facts[name] for name in SIZES))


def measured_intervals(pipeline: Sequence[RankTimeline], orders: Sequence[Order]) -> list[Interval]:
    """What the ranks of a pipeline computed, in seconds since the first of them began.

    Raises TimelineError where that is not what they were to compute, in this order.
    """
    if len(pipeline) != len(orders):
        raise TimelineError(
            f"{len(pipeline)} ranks of a pipeline of {len(orders)} are recorded: record again"
        )
    spans = [timeline.lane("compute") for timeline in pipeline]
    for timeline, of_rank, order in zip(pipeline, spans, orders, strict=True):
        if [computation_of(span.detail) for span in of_rank] != order:
            raise TimelineError(
                f"rank {timeline.rank} recorded {len(of_rank)} computations that are not the {len(order)} of "
                f"its schedule {timeline.facts['pipeline_schedule']}: record again"
            )
    first = min(span.begin_seconds for of_rank in spans for span in of_rank)
    return [
        Interval(span.begin_seconds - first, span.end_seconds - first, rank, action)
        for rank, (of_rank, order) in enumerate(zip(spans, orders, strict=True))
        for span, action in zip(of_rank, order, strict=True)
    ]


def planned_intervals(
    measured: Sequence[Interval], orders: Sequence[Order], placement: Placement
) -> list[Interval]:
    """The plan for computations that take as long as they did on the average, and transfers no time."""
    return play(orders, placement, mean_durations(measured, placement.num_chunks))


def figures(pipeline: Sequence[RankTimeline]) -> list[list[float]]:
    """For each rank of a pipeline, under HEADINGS, seconds.

    Waits are from the first computation of a pipeline to its last, less the rank's own: as measured; if each
    took as long as it did, and transfers no time; and if all of a kind took equally long besides.
    """
    orders, placement = planned_orders(pipeline)
    measured = measured_intervals(pipeline, orders)
    timelines = (
        measured,
        replay(measured, orders, placement),
        planned_intervals(measured, orders, placement),
    )
    return [
        [
            _sum(timeline, "compute"),
            *(idle(intervals, rank) for intervals in timelines),
            _sum(timeline, "update"),
            _sum(timeline, "collective wait"),
        ]
        for rank, timeline in enumerate(pipeline)
    ]


def _sum(timeline: RankTimeline, lane: str) -> float:
    return sum(span.seconds for span in timeline.lane(lane))


def draw(pipeline: Sequence[RankTimeline]) -> Figure:
    """Measured above planned, over the same seconds."""
    orders, placement = planned_orders(pipeline)
    measured = measured_intervals(pipeline, orders)
    drawn = {"measured": measured, "planned": planned_intervals(measured, orders, placement)}
    figure = Figure(figsize=(14, 2.2 + len(pipeline)), layout="constrained")
    end = max(interval.end for interval in measured)
    for axes, (name, intervals) in zip(figure.subplots(2, sharex=True), drawn.items(), strict=True):
        draw_ranks(axes, intervals, font_points=7)
        waits = sum(idle(intervals, rank) for rank in range(len(pipeline))) / len(pipeline)
        axes.set_title(f"{name}: a rank waits {waits:.3f} s", loc="left", fontsize=11)
    axes.set_xlim(0, end)
    axes.set_xlabel("seconds since the first forward began")
    explain(figure, measured)
    return figure


def plot_timeline(arguments: argparse.Namespace) -> None:
    """Print the figures, write the picture and the merged trace.

    Raises TimelineError where the run has no complete recording, or no such pipeline.
    """
    timelines = read_timelines(arguments.run_dir)
    pipelines = pipelines_of(timelines)
    if not 0 <= arguments.pipeline < len(pipelines):
        raise TimelineError(
            f"--pipeline {arguments.pipeline}: the run has {len(pipelines)}, counted from 0: choose another"
        )
    pipeline = pipelines[arguments.pipeline]
    facts = pipeline[0].facts
    missing = [name for name in PLANNED if name not in facts]
    if missing:
        raise TimelineError(
            f"the recording of {arguments.run_dir} does not say {missing[0]}: record it again"
        )
    print(f"step {facts['step']}, {facts['pipeline_schedule']}, seconds; see --help")
    print("rank" + "".join(f"{heading:>19}" for heading in HEADINGS))
    for timeline, row in zip(pipeline, figures(pipeline), strict=True):
        print(f"{timeline.rank:4}" + "".join(f"{seconds:19.4f}" for seconds in row))
    error = max(timeline.facts["clock_error_seconds"] for timeline in timelines)
    print(f"clocks are aligned to {error:.6f} s or better")
    merged = arguments.run_dir / "timeline.json"
    output = arguments.output or arguments.run_dir / "timeline.png"
    save_figure(draw(pipeline), output, dots_per_inch=150)
    write_merged(merged, timelines)
    print(f"wrote {output} and {merged}, which ui.perfetto.dev opens")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXPLANATION,
    )
    add = parser.add_argument
    add("run_dir", type=Path, help="the run's folder")
    add("--output", type=Path, help="picture to write (default: RUN_DIR/timeline.png)")
    add("--pipeline", type=int, default=0, help="which pipeline is drawn (default: %(default)s)")
    arguments = parser.parse_args(argv)
    return run_command(lambda: plot_timeline(arguments))


if __name__ == "__main__":
    sys.exit(main())
