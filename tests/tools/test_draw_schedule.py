"""A pipeline schedule as a picture."""

import pytest
from matplotlib.patches import Rectangle

from megalite.pipeline.actions import BackwardWeight
from megalite.pipeline.schedule import orders_of
from megalite.pipeline.timeline import play
from tools import draw_schedule

WAITING = {
    "1f1b": 27.3,
    "afab": 27.3,
    "interleaved": 15.8,
    "zb-h1": 11.1,
    "zbv": 5.9,
}  # 100 idle / (24 + idle)


@pytest.mark.parametrize("name", WAITING)
def test_a_schedule_becomes_a_picture(tmp_path, capsys, name):
    output = tmp_path / "schedule.png"
    arguments = ["--pipeline-schedule", name, "--pp-size", "4", "--num-micro-batches", "8"]
    assert draw_schedule.main([*arguments, "--output", str(output)]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")
    assert f"waiting {WAITING[name]}% of the time" in capsys.readouterr().out


def test_every_computation_is_one_box_at_its_time_and_stage():
    intervals = play(*orders_of("1f1b", 3, 4))
    boxes = [
        patch for patch in draw_schedule.draw(intervals, "").axes[0].patches if isinstance(patch, Rectangle)
    ]
    drawn = [
        (box.get_x(), box.get_x() + box.get_width(), box.get_y() + box.get_height() / 2) for box in boxes
    ]
    assert drawn == [pytest.approx(interval[:3]) for interval in intervals]


def test_weight_gradients_have_a_colour_of_their_own_and_later_chunks_are_darker():
    intervals = play(*orders_of("zbv", 2, 3))
    boxes = [p for p in draw_schedule.draw(intervals, "").axes[0].patches if isinstance(p, Rectangle)]
    colours = {}
    for interval, box in zip(intervals, boxes, strict=True):
        kind, chunk = type(interval.action), interval.action.chunk
        assert colours.setdefault((kind, chunk), box.get_facecolor()) == box.get_facecolor()
    assert len(set(colours.values())) == 6
    assert sum(colours[BackwardWeight, 1][:3]) < sum(colours[BackwardWeight, 0][:3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pp-size", "0"], "a pipeline of 0 stages"),
        (["--num-micro-batches", "0"], "a step of 0 micro batches"),
        (["--num-chunks", "2"], "num_chunks is 2 and pipeline_schedule 1f1b has 1"),
        (["--output", "absent/schedule.png"], "absent/schedule.png"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert draw_schedule.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
