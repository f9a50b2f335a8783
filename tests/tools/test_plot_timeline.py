"""A recorded step beside its plan, in figures and as a picture."""

import json
from dataclasses import asdict, replace

import pytest
from matplotlib.patches import Rectangle

from megalite.measure.timeline import RankTimeline, Span, timeline_path, write_timeline
from megalite.pipeline.actions import Forward
from megalite.pipeline.schedule import orders_of
from megalite.pipeline.timeline import Durations, idle, play
from tools import plot_timeline

RANKS, MICRO_BATCHES, ORIGIN = 3, 4, 100.0
TOOK = Durations(0.1, 0.2, 0.05)


def spans_of(intervals, rank):
    for interval in intervals:
        if interval.rank == rank:
            detail = {"action": type(interval.action).__name__, **asdict(interval.action)}
            yield Span("compute", "computation", ORIGIN + interval.start, ORIGIN + interval.end, detail)
    yield Span("update", "optimizer", ORIGIN + 9, ORIGIN + 9.25)
    yield Span("collective wait", "wait", ORIGIN, ORIGIN + 0.125)


def recording(name, intervals, first_rank=0, world_size=RANKS):
    """Of one pipeline, whose ranks follow each other in the world."""
    facts = {"pipeline_schedule": name, "pp_size": RANKS, "num_micro_batches": MICRO_BATCHES}
    num_chunks = orders_of(name, RANKS, MICRO_BATCHES)[1].num_chunks
    facts |= {"num_chunks": num_chunks, "step": 3, "world_size": world_size, "pipeline": first_rank}
    facts |= {"clock_error_seconds": 0.0005}
    return [
        RankTimeline(
            first_rank + rank,
            {**facts, "rank": first_rank + rank, "pp_rank": rank},
            tuple(spans_of(intervals, rank)),
        )
        for rank in range(RANKS)
    ]


def planned(name):
    return play(*orders_of(name, RANKS, MICRO_BATCHES), TOOK)


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb-h1", "zbv"])
def test_a_step_that_went_as_planned_waits_as_planned(name):
    intervals = planned(name)
    for rank, row in enumerate(plot_timeline.figures(recording(name, intervals))):
        compute, measured, without_transfers, even, optimizer, collectives = row
        expected = idle(intervals, rank)
        assert [measured, without_transfers, even] == pytest.approx([expected] * 3)
        assert compute == pytest.approx(MICRO_BATCHES * 0.35)
        assert (optimizer, collectives) == pytest.approx((0.25, 0.125))


def test_waits_for_transfers_and_for_slower_ranks_are_told_apart():
    """A last rank whose first forward takes 0.06 longer, and transfers that hold up all of it by 0.5."""
    orders, placement = orders_of("1f1b", RANKS, MICRO_BATCHES)

    def took(rank, action):
        slower = 0.06 if (rank, action) == (RANKS - 1, Forward(0)) else 0.0
        return TOOK.of(action) + slower

    unheld = play(orders, placement, took)
    held = [
        i if i.rank < RANKS - 1 and i.start < 0.25 else i._replace(start=i.start + 0.5, end=i.end + 0.5)
        for i in unheld
    ]
    rows = plot_timeline.figures(recording("1f1b", held))
    mean_forward = 0.1 + 0.06 / (RANKS * MICRO_BATCHES)
    even = play(orders, placement, Durations(mean_forward, 0.2, 0.05))
    for rank, (_, measured, without_transfers, plan, *_) in enumerate(rows):
        assert measured - without_transfers == pytest.approx(0.5)
        assert without_transfers == pytest.approx(idle(unheld, rank))
        assert plan == pytest.approx(idle(even, rank))
    assert rows[0][2] > rows[0][3] + 0.05  # the first rank waits for the slower one


def test_the_picture_has_what_was_measured_above_the_plan():
    late = [i._replace(start=2 * i.start, end=2 * i.start + (i.end - i.start)) for i in planned("zb-h1")]
    figure = plot_timeline.draw(recording("zb-h1", late))
    for axes, intervals in zip(figure.axes, (late, planned("zb-h1")), strict=True):
        boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
        assert [box.get_x() for box in boxes] == pytest.approx([i.start for i in intervals])
        assert [box.get_width() for box in boxes] == pytest.approx([i.end - i.start for i in intervals])


def write(folder, timelines):
    for timeline in timelines:
        write_timeline(timeline_path(folder, timeline.rank), timeline)


def test_the_tool_draws_one_pipeline_and_merges_all(tmp_path, capsys):
    both = [recording("1f1b", planned("1f1b"), first, 2 * RANKS) for first in (0, RANKS)]
    write(tmp_path, [timeline for pipeline in both for timeline in pipeline])
    assert plot_timeline.main([str(tmp_path), "--pipeline", "1", "--output", str(tmp_path / "t.png")]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told[2:5]] == ["3", "4", "5"]
    assert float(told[2].split()[2]) == pytest.approx(idle(planned("1f1b"), 0), abs=1e-4)
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == set(range(2 * RANKS))


def test_what_cannot_be_drawn_is_one_line_and_leaves_nothing(tmp_path, capsys):
    assert plot_timeline.main([str(tmp_path)]) == 2
    write(tmp_path, recording("1f1b", planned("1f1b")))
    assert plot_timeline.main([str(tmp_path), "--pipeline", "1"]) == 2
    [first, *others] = recording("1f1b", planned("1f1b"))
    short = [span for span in first.spans if span.detail.get("micro_batch") != 2]
    write(tmp_path, [replace(first, spans=tuple(short)), *others])
    assert plot_timeline.main([str(tmp_path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(line.startswith("error: ") for line in errors)
    assert "set logging.timeline_at_step" in errors[0]
    assert "--pipeline 1: the run has 1" in errors[1]
    assert "rank 0 recorded 6 computations that are not the 8 of its schedule 1f1b" in errors[2]
    assert not [*tmp_path.glob("*.png"), *tmp_path.glob("timeline.json")]
