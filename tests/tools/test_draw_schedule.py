"""A pipeline schedule as a picture."""

import pytest
from matplotlib.patches import Rectangle

from megalite.pipeline.timeline import timeline
from tools import draw_schedule


@pytest.mark.parametrize("name", ["1f1b", "afab"])
def test_a_schedule_becomes_a_picture(tmp_path, capsys, name):
    output = tmp_path / "schedule.png"
    arguments = ["--pipeline-schedule", name, "--pp-size", "4", "--num-micro-batches", "8"]
    assert draw_schedule.main([*arguments, "--output", str(output)]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")
    assert "waiting 27.3% of the time" in capsys.readouterr().out


def test_every_computation_is_one_box_at_its_time_and_stage():
    intervals = timeline("1f1b", 3, 4)
    boxes = [
        patch for patch in draw_schedule.draw(intervals, "").axes[0].patches if isinstance(patch, Rectangle)
    ]
    drawn = [
        (box.get_x(), box.get_x() + box.get_width(), box.get_y() + box.get_height() / 2) for box in boxes
    ]
    assert drawn == [pytest.approx(interval[:3]) for interval in intervals]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pp-size", "0"], "a pipeline of 0 stages"),
        (["--num-micro-batches", "0"], "a step of 0 micro batches"),
        (["--output", "absent/schedule.png"], "absent/schedule.png"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert draw_schedule.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
