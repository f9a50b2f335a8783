"""The curves of a run and its experts as pictures, and one clear line where there is none."""

import json

import numpy as np
import pytest

from megalite.measure.expert_load import expert_loads
from tools import plot_run
from tools.plot_run import draw, draw_experts, read_rows, smoothed

PNG = b"\x89PNG\r\n\x1a\n"


def write_run(folder, num_steps, validate_every=10):
    rows = []
    for step in range(1, num_steps + 1):
        rows.append({"step": step, "loss": 6 / step, "grad_norm": 1.0, "learning_rate": 1e-3 / step})
        rows[-1] |= {"tokens_per_second": 1000.0 + step, "step_seconds": 0.1}
        if step % validate_every == 0:
            rows[-1]["validation_loss"] = 6.5 / step
    write_rows(folder, rows)
    return rows


def write_rows(folder, rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


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


# Experts.

LAYERS, NUM_EXPERTS = (2, 3, 5), 4


def write_run_with_experts(folder, num_steps, every=1):
    rows, random = write_run(folder, num_steps), np.random.default_rng(0)
    for row in rows:
        row |= {"expert_largest_violation": 2 / row["step"], "expert_bias_min": -0.1, "expert_bias_max": 0.2}
        if row["step"] % every == 0 or row["step"] == num_steps:
            row["expert_tokens"] = {
                str(layer): random.integers(1, 99, NUM_EXPERTS).tolist() for layer in LAYERS
            }
    write_rows(folder, rows)
    return rows


@pytest.mark.parametrize("num_steps", [1, 60])
def test_a_run_with_experts_becomes_two_pictures(tmp_path, capsys, num_steps):
    write_run_with_experts(tmp_path, num_steps, every=7)
    assert plot_run.main([str(tmp_path), "--experts-output", str(tmp_path / "load.png")]) == 0
    for name in ("metrics.png", "load.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)
    written = capsys.readouterr().out
    assert f"wrote {tmp_path / 'metrics.png'} and {tmp_path / 'load.png'}: {num_steps} step" in written


def test_a_run_without_experts_becomes_one(tmp_path, capsys):
    write_run(tmp_path, 3)
    assert plot_run.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'metrics.png'}: 3 steps, last loss 2.0000\n"
    assert not (tmp_path / "experts.png").exists()


def test_the_maps_hold_the_load_of_each_expert_at_its_steps(tmp_path):
    rows = write_run_with_experts(tmp_path, 20, every=3)
    violation, bias, *maps = draw_experts(read_rows(tmp_path), "run").axes
    assert points(violation.lines[0]) == [(row["step"], 2 / row["step"]) for row in rows]
    assert {y for line in bias.lines for _, y in points(line)} == {-0.1, 0.2}
    drawn = {axes.get_title(loc="left"): axes.collections[0] for axes in maps if axes.get_title(loc="left")}
    assert list(drawn) == [f"layer {layer}" for layer in LAYERS]
    kept = [row for row in rows if "expert_tokens" in row]
    for layer in LAYERS:
        mesh = drawn[f"layer {layer}"]
        tokens = np.array([row["expert_tokens"][str(layer)] for row in kept]).T
        np.testing.assert_allclose(mesh.get_array(), tokens / tokens.mean(0))
        edges = mesh.get_coordinates()[0, :, 0]
        assert edges.tolist() == [2.5, 4.5, 7.5, 10.5, 13.5, 16.5, 19.0, 20.5]  # between 3, 6, ... 18, 20
        assert mesh.get_clim() == (0, 2)


def test_neighbouring_steps_share_a_column_where_there_are_many(tmp_path):
    rows = write_run_with_experts(tmp_path, 5)
    edges, loads = expert_loads(rows, most_columns=2)
    assert edges.tolist() == [0.5, 3.5, 5.5]
    tokens = np.array([row["expert_tokens"]["2"] for row in rows])
    sums = np.stack([tokens[:3].sum(0), tokens[3:].sum(0)], axis=1)
    np.testing.assert_allclose(loads[2], sums / sums.mean(0))
    assert expert_loads(rows)[1][2].shape == (NUM_EXPERTS, 5)


def test_a_layer_whose_tokens_do_not_count_has_no_load():
    row = {"step": 1, "expert_tokens": {"0": [0, 0]}}
    assert expert_loads([row])[1][0].tolist() == [[0], [0]]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"2": [1] * 4, "5": [1] * 4}, "step 2: 0 experts of layer 3 in expert_tokens, 4 in step 1"),
        ({"2": [1] * 4, "3": [1] * 4, "5": [1] * 6}, "step 2: 6 experts of layer 5 in expert_tokens, 4 in"),
        ({"2": [1] * 4, "3": [1] * 4, "5": [[1]]}, "step 2: expert_tokens is not whole numbers"),
        ({"2": [1] * 4, "3": [1] * 4, "5": [0.5] * 4}, "step 2: expert_tokens is not whole numbers"),
        ({"two": [1] * 4}, "step 2: expert_tokens is not whole numbers"),
        ([1, 2], "step 2: expert_tokens is not whole numbers"),
    ],
)
def test_rows_that_tell_of_other_experts_are_one_line(tmp_path, capsys, tokens, message):
    rows = write_run_with_experts(tmp_path, 3)
    rows[1]["expert_tokens"] = tokens
    write_rows(tmp_path, rows)
    assert plot_run.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "metrics.png").exists()


def test_each_task_of_an_evaluation_has_a_panel_with_its_metrics(tmp_path):
    rows = write_run(tmp_path, 20)
    for row in rows[9::10]:
        row |= {"evaluation/a/acc": row["step"] / 100, "evaluation/a/acc_norm": 0.5, "evaluation/b/acc": 1.0}
    write_rows(tmp_path, rows)
    panels = {axes.get_title(loc="left"): axes for axes in draw(read_rows(tmp_path), "run").axes}
    curves = {line.get_label(): line.get_xydata().tolist() for line in panels["Evaluation: a"].lines}
    assert curves == {"acc": [[10, 0.1], [20, 0.2]], "acc_norm": [[10, 0.5], [20, 0.5]]}
    assert [line.get_label() for line in panels["Evaluation: b"].lines] == ["acc"]


def write_run_with_pairs(folder, num_steps):
    rows = write_run(folder, num_steps)
    for row in rows:
        step = row["step"]
        row |= {"rewards/chosen": step / 10, "rewards/rejected": -step / 5, "rewards/margins": 0.3 * step}
        row["rewards/accuracies"] = 1 - 1 / step
        if "validation_loss" in row:
            row["validation_rewards/accuracies"] = 0.9 - 1 / step
    write_rows(folder, rows)
    return rows


def test_pairs_have_panels_of_their_rewards_and_of_those_told_right(tmp_path):
    rows = write_run_with_pairs(tmp_path, 19)
    panels = {axes.get_title(loc="left"): axes for axes in draw(read_rows(tmp_path), "run").axes}
    assert "Loss (nats per pair)" in panels
    curves = {line.get_label(): points(line) for line in panels["Reward of each answer"].lines}
    assert curves == {
        name: [(row["step"], row[f"rewards/{name}"]) for row in rows] for name in ("chosen", "rejected")
    }
    told = panels["Share of pairs whose chosen answer has the larger reward"]
    curves = {line.get_label(): points(line) for line in told.lines}
    assert curves["train"] == [(row["step"], row["rewards/accuracies"]) for row in rows]
    assert curves["validation"] == [(10, 0.8)]


def test_a_run_without_pairs_has_no_panels_of_rewards(tmp_path):
    write_run(tmp_path, 3)
    assert len(draw(read_rows(tmp_path), "run").axes) == 4
