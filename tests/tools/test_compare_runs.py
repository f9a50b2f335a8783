"""Two runs are told apart by any number of any step, and by nothing else."""

import json
import math

import pytest

from tools import compare_runs


def rows_of(num_steps=6):
    """Rows as a run writes them, validated at every second step."""
    rows = []
    for step in range(1, num_steps + 1):
        rows.append({"step": step, "loss": 6 / step, "grad_norm": 1.5, "learning_rate": 1e-3 / step})
        rows[-1] |= {"consumed_samples": 16 * step, "step_seconds": 0.1, "mfu": 0.3, "tokens_per_second": 9.0}
        if step % 2 == 0:
            rows[-1]["validation_loss"] = 6.5 / step
    return rows


@pytest.fixture
def compare(tmp_path, capsys):
    """The command on two lists of rows, or texts of a file: (exit status, stdout, stderr)."""

    def compare(a, b, *options):
        for name, rows in (("a", a), ("b", b)):
            text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "metrics.jsonl").write_text(text)
        status = compare_runs.main([str(tmp_path / "a"), str(tmp_path / "b"), *options])
        return status, *capsys.readouterr()

    return compare


def changed(step, **values):
    """The rows with other values at one step."""
    return [row | values if row["step"] == step else row for row in rows_of()]


def test_runs_that_recorded_the_same_are_bit_equal(compare):
    status, shown, _ = compare(rows_of(), rows_of())
    fields = "loss, grad_norm, learning_rate, consumed_samples, validation_loss"
    assert (status, shown) == (0, f"bit-equal: 6 steps, {fields}\n")


def test_speed_is_not_compared(compare):
    slower = changed(3, step_seconds=9.0, tokens_per_second=1.0, mfu=0.1)
    assert compare(rows_of(), slower)[0] == 0


@pytest.mark.parametrize("field", ["loss", "grad_norm", "learning_rate", "consumed_samples"])
def test_the_last_bit_of_any_number_is_a_difference(compare, field):
    value = rows_of()[2][field]
    other = value + 1 if isinstance(value, int) else math.nextafter(value, math.inf)
    status, shown, _ = compare(rows_of(), changed(3, **{field: other}))
    assert status == 1
    assert f"first difference: step 3, {field}: {value} and {other}\n" in shown


def test_the_first_difference_is_the_earliest_and_the_largest_is_named_with_its_step(compare):
    others = changed(4, validation_loss=2.0, loss=3.0)
    others[5]["loss"] = 1.25
    status, shown, _ = compare(rows_of(), others)
    assert status == 1
    assert "first difference: step 4, loss: 1.5 and 3.0\n" in shown
    assert "  loss              0.5 at step 4\n" in shown
    assert "  validation_loss   0.188 at step 4\n" in shown
    assert "  grad_norm         bit-equal\n" in shown


@pytest.mark.parametrize(
    ("tolerance", "status", "verdict"), [("1e-6", 0, "within"), ("1e-8", 1, "not within")]
)
def test_a_tolerance_is_relative(compare, tolerance, status, verdict):
    large = [row | {"loss": 1e9 * row["loss"]} for row in rows_of()]
    close = [row | {"loss": row["loss"] * (1 + 1e-7)} for row in large]
    found, shown, _ = compare(large, close, "--tolerance", tolerance)
    assert found == status
    assert shown.startswith(f"{verdict} a tolerance of {tolerance.replace('-', '-0')}: 6 steps\n")


def test_the_first_difference_is_the_first_beyond_the_tolerance(compare):
    others = changed(2, loss=3.0000001)
    others[4]["loss"] = 2.0
    assert "first difference: step 5, loss" in compare(rows_of(), others, "--tolerance", "1e-3")[1]


def test_two_nan_are_equal_and_one_is_not(compare):
    broken = changed(3, grad_norm=math.nan)
    assert compare(broken, broken)[0] == 0
    status, shown, _ = compare(broken, rows_of(), "--tolerance", "1e9")
    assert status == 1 and "step 3, grad_norm: nan and 1.5" in shown
    assert "grad_norm         inf at step 3" in shown


def test_two_infinities_are_equal_only_with_the_same_sign(compare):
    assert compare(changed(3, loss=math.inf), changed(3, loss=math.inf))[0] == 0
    assert compare(changed(3, loss=math.inf), changed(3, loss=-math.inf))[0] == 1


def test_numbers_too_large_to_subtract_are_compared(compare):
    status, shown, _ = compare(changed(3, loss=1.7e308), changed(3, loss=-1.7e308))
    assert status == 1 and "loss              2 at step 3" in shown


def test_a_validation_that_one_run_has_missed_is_a_difference(compare):
    missed = rows_of()
    del missed[3]["validation_loss"]
    status, shown, _ = compare(rows_of(), missed)
    assert status == 1 and "step 4, validation_loss: 1.625 and nothing" in shown


def test_a_field_that_only_one_run_has_is_named(compare):
    richer = [row | {"loss_scale": 1.0} for row in rows_of()]
    for pair in ((rows_of(), richer), (richer, rows_of())):
        status, shown, _ = compare(*pair)
        assert status == 0 and shown.endswith("only one of the runs has them: loss_scale\n")


def test_the_order_of_the_rows_does_not_matter(compare):
    assert compare(rows_of(), rows_of()[::-1])[0] == 0


def test_json_holds_the_same(compare):
    status, shown, _ = compare(rows_of(), changed(4, loss=3.0, grad_norm=math.nan), "--json")
    facts = json.loads(shown)
    assert (status, facts["bit_equal"], facts["within_tolerance"]) == (1, False, False)
    assert (facts["tolerance"], facts["num_steps"]) == (0, 6)
    expected = {"step": 4, "field": "loss", "a": 1.5, "b": 3.0, "relative_difference": 0.5}
    assert facts["first_difference"] == expected
    assert facts["fields"]["loss"] == {"largest_relative_difference": 0.5, "step": 4}
    assert facts["fields"]["grad_norm"]["largest_relative_difference"] == "inf"
    assert facts["fields"]["learning_rate"]["largest_relative_difference"] == 0
    equal = json.loads(compare(rows_of(), rows_of(), "--json")[1])
    assert equal["bit_equal"] and equal["first_difference"] is None


GOOD = '{"step": 1, "loss": 1.0}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty: the run has not taken a step yet"),
        ("not json\n", "line 1: not JSON"),
        (GOOD + '{"step": 2, "lo', "line 2: not JSON"),
        ("[1]\n", "line 1: expected an object with a whole number 'step'"),
        ('{"step": "1"}\n', "line 1: expected an object with a whole number 'step'"),
        (GOOD + GOOD, "line 2: step 1 a second time"),
        (GOOD.replace("1,", "7,"), "no step in common: the first run has 1 step from 1 to 1"),
        (GOOD + GOOD.replace("1,", "2,"), "the second 2 steps from 1 to 2, and step 2 is only in the second"),
        ('{"step": 1, "accuracy": 1.0}\n', "loss in the first run, accuracy in the second: compare"),
        ('{"step": 1}\n', "no number in common: loss in the first run, none in the second"),
    ],
)  # fmt: skip
def test_runs_that_cannot_be_compared_are_one_line(compare, content, message):
    status, shown, error = compare(GOOD, content)
    assert (status, shown) == (2, "")
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_a_folder_that_is_not_there_is_one_line(tmp_path, capsys):
    assert compare_runs.main([str(tmp_path / "a"), str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "a/metrics.jsonl: No such file or directory: give the folder" in error


@pytest.mark.parametrize("tolerance", ["much", "-1", "nan", "inf"])
def test_a_wrong_tolerance_is_refused(tmp_path, capsys, tolerance):
    with pytest.raises(SystemExit) as left:
        compare_runs.main([str(tmp_path), str(tmp_path), f"--tolerance={tolerance}"])
    assert left.value.code == 2 and "is not a ratio" in capsys.readouterr().err


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit):
        compare_runs.main(["--help"])
    assert "tools/compare_runs.py runs/before runs/after" in capsys.readouterr().out
