"""The curves of a run as a picture, and one clear line where there is none."""

import json

import pytest

from tools import plot_run
from tools.plot_run import draw, read_rows, smoothed

PNG = b"\x89PNG\r\n\x1a\n"


def write_run(folder, num_steps, validate_every=10):
    rows = []
    for step in range(1, num_steps + 1):
        rows.append({"step": step, "loss": 6 / step, "grad_norm": 1.0, "learning_rate": 1e-3 / step})
        rows[-1] |= {"tokens_per_second": 1000.0 + step, "step_seconds": 0.1}
        if step % validate_every == 0:
            rows[-1]["validation_loss"] = 6.5 / step
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.mark.parametrize("num_steps", [1, 60])
def test_a_run_becomes_a_picture(tmp_path, capsys, num_steps):
    write_run(tmp_path, num_steps)
    assert plot_run.main([str(tmp_path), "--output", str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
    assert f"{num_steps} step" in capsys.readouterr().out


def test_without_an_output_the_picture_lies_in_the_run(tmp_path):
    write_run(tmp_path, 3)
    assert plot_run.main([str(tmp_path)]) == 0
    assert (tmp_path / "metrics.png").exists()


def test_the_curves_hold_the_numbers_of_the_run(tmp_path):
    rows = write_run(tmp_path, 60)
    loss, grad_norm, learning_rate, speed = draw(read_rows(tmp_path), "run").axes
    panels = {
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "tokens_per_second": speed,
    }
    for name, axes in panels.items():
        assert points(axes.lines[0]) == [(row["step"], row[name]) for row in rows], name
    validated = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    assert len(validated) == 6 and points(loss.lines[-1]) == validated


def points(line):
    return [(x, y) for x, y in line.get_xydata()]


def test_smoothing_keeps_a_constant_and_starts_without_bias():
    assert smoothed([3.0] * 5, 4) == pytest.approx([3.0] * 5)
    assert smoothed([1.0, 5.0, 2.0], 1) == [1.0, 5.0, 2.0]
    assert smoothed([1.0, 2.0], 2) == pytest.approx([1.0, (0.5 * 1 + 2) / 1.5])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("", "is empty: the run has not taken a step yet"),
        ('{"step": 1}\n', "line 1: not a row of metrics with step, loss"),
        ("not json\n", "line 1: not a row of metrics"),
        (
            '{"step": 1, "loss": "low", "grad_norm": 1, "learning_rate": 1, "tokens_per_second": 1}\n',
            "line 1: loss is not a number",
        ),
    ],
)
def test_a_folder_without_usable_metrics_is_one_line(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert plot_run.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "metrics.png").exists()


def test_an_output_that_cannot_be_written_is_one_line(tmp_path, capsys):
    write_run(tmp_path, 3)
    for name in ("absent/curves.png", "curves.unknown"):
        assert plot_run.main([str(tmp_path), "--output", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
