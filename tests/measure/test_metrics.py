"""What is recorded of a run, shown of it, and survives an interruption."""

import io
import json

import pytest

from megalite.measure.metrics import METRICS_FILE, TENSORBOARD_TAGS, Metrics, Workload, cut_rows_after
from megalite.measure.progress import Progress, seconds_in_words

WORKLOAD = Workload(
    samples_per_step=8, tokens_per_sample=128, flops_per_token=6e6, peak_flops_per_second=1e11
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def open_metrics(folder, last_step=0, tensorboard=False, stream=None, **progress):
    shown = Progress(10, last_step=last_step, stream=stream or io.StringIO(), **progress)
    return Metrics(folder, WORKLOAD, shown, last_step=last_step, tensorboard=tensorboard)


def record(metrics, *steps, **values):
    for step in steps:
        row = {"loss": 5.0 / step, "grad_norm": 1.5, "learning_rate": 1e-3, "step_seconds": 0.5}
        row |= {"consumed_samples": 8 * step}
        metrics.record(step=step, **{**row, **values})


def rows_of(folder):
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


# The numbers.


def test_speed_is_tokens_over_time_and_mfu_is_model_flops_over_peak():
    speed = WORKLOAD.speed(step_seconds=0.5)
    assert speed["tokens_per_second"] == 8 * 128 / 0.5
    assert speed["mfu"] == pytest.approx(2048 * 6e6 / 1e11)


def test_a_row_has_every_field_of_the_contract(tmp_path):
    metrics = open_metrics(tmp_path)
    record(metrics, 1)
    record(metrics, 2, validation_loss=2.75, consumed_samples=24)  # 8 of them were left out
    metrics.close()
    assert rows_of(tmp_path)[1] == {
        "step": 2,
        "loss": 2.5,
        "grad_norm": 1.5,
        "learning_rate": 1e-3,
        "consumed_samples": 24,
        "consumed_tokens": 3072,
        "step_seconds": 0.5,
        "tokens_per_second": 2048.0,
        "mfu": pytest.approx(0.12288),
        "validation_loss": 2.75,
    }
    assert "validation_loss" not in rows_of(tmp_path)[0]


def test_further_numbers_are_kept_by_their_names_and_none_is_left_out(tmp_path):
    metrics = open_metrics(tmp_path)
    record(metrics, 1, validation_loss=None, expert_load=0.25)
    record(metrics, 2)
    metrics.close()
    first, second = rows_of(tmp_path)
    assert first.keys() - second.keys() == {"expert_load"} and first["expert_load"] == 0.25


def test_a_row_is_on_disk_as_soon_as_it_is_recorded(tmp_path):
    metrics = open_metrics(tmp_path)
    for step in (1, 2, 3):
        record(metrics, step)
        assert [row["step"] for row in rows_of(tmp_path)] == list(range(1, step + 1))
    metrics.close()


# Resumption.


@pytest.mark.parametrize("last_step", [0, 1, 3, 5])
def test_resuming_leaves_each_step_exactly_once(tmp_path, last_step):
    first = open_metrics(tmp_path)
    record(first, 1, 2, 3, 4, 5, loss=1.0)
    first.close()
    second = open_metrics(tmp_path, last_step=last_step)
    record(second, *range(last_step + 1, 8), loss=2.0)
    second.close()
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 8))
    assert [row["loss"] for row in rows] == [1.0] * last_step + [2.0] * (7 - last_step)


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3}', "garbage\n", "[]\n"])
def test_a_row_that_a_crash_cut_short_is_removed(tmp_path, torn):
    file = tmp_path / METRICS_FILE
    file.write_text('{"step": 1}\n{"step": 2}\n' + torn)
    cut_rows_after(file, 3)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_cutting_is_all_or_nothing(tmp_path, monkeypatch):
    file = tmp_path / METRICS_FILE
    before = '{"step": 1}\n{"step": 2}\n'
    file.write_text(before)

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        cut_rows_after(file, 1)
    assert file.read_text() == before


def test_nothing_to_cut_leaves_the_file_alone(tmp_path):
    file = tmp_path / METRICS_FILE
    cut_rows_after(file, 1)
    assert not file.exists()
    file.write_text('{"step": 1}\n')
    written_at = file.stat().st_mtime_ns, file.stat().st_ino
    cut_rows_after(file, 1)
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == written_at


def test_tensorboard_shows_each_step_once_after_a_resumption(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = open_metrics(tmp_path, tensorboard=True)
    record(first, 1, 2, 3, 4, loss=1.0, validation_loss=3.0, expert_load=0.25, absent=None)
    first.close()
    second = open_metrics(tmp_path, last_step=2, tensorboard=True)
    record(second, 3, 4, 5, loss=2.0)
    second.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    curve = [(event.step, event.value) for event in events.Scalars("loss/train")]
    assert curve == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]
    assert [event.step for event in events.Scalars("loss/validation")] == [1, 2]
    assert [(event.step, event.value) for event in events.Scalars("more/expert_load")] == [
        (1, 0.25),
        (2, 0.25),
    ]
    assert set(events.Tags()["scalars"]) == {*TENSORBOARD_TAGS.values(), "more/expert_load"}


# What people see.


def test_without_a_terminal_progress_is_one_plain_line_every_few_steps(tmp_path):
    stream = io.StringIO()
    metrics = open_metrics(tmp_path, stream=stream, every_steps=4)
    record(metrics, *range(1, 6))
    record(metrics, 6, validation_loss=2.0)
    record(metrics, *range(7, 11))
    metrics.close()
    lines = stream.getvalue().splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["step 4/10", "step 6/10", "step 8/10", "step 10/10"]
    assert lines[0].startswith(
        "step 4/10 | loss 1.2500 | grad norm 1.500 | lr 1.00e-03 | 2,048 tokens/s | MFU 12.3%"
    )
    assert "validation loss 2.0000" in lines[1] and lines[1].endswith(" left")
    assert lines[-1].endswith(" | done")
    assert "\r" not in stream.getvalue()


def test_a_run_with_experts_shows_its_largest_violation(tmp_path):
    stream = io.StringIO()
    metrics = open_metrics(tmp_path, stream=stream)
    record(metrics, 1, expert_largest_violation=0.256)
    metrics.close()
    assert " | lr 1.00e-03 | expert violation 0.26 | 2,048 tokens/s | " in stream.getvalue()
    assert ": loss 5.0000, expert violation 0.26, 2,048 tokens/s, MFU" in metrics.summary()


def test_a_preference_run_shows_its_margins_and_those_of_held_out_pairs(tmp_path):
    stream = io.StringIO()
    metrics = open_metrics(tmp_path, stream=stream)
    rewards = {"rewards/margins": 0.25, "rewards/accuracies": 0.75}
    held_out = {"validation_loss": 0.5, "validation_rewards/margins": -0.125}
    record(metrics, 1, **rewards, **held_out, **{"validation_rewards/accuracies": 0.5})
    record(metrics, 2, **{"rewards/margins": 0.375})
    metrics.close()
    first, second = stream.getvalue().splitlines()
    validation = "validation loss 0.5000 (margin -0.1250, accuracy 50.0%)"
    assert f" | loss 5.0000 (margin 0.2500, accuracy 75.0%) | {validation} | " in first
    assert " | loss 2.5000 (margin 0.3750) | " in second
    assert f": loss 2.5000 (margin 0.3750), {validation}, 2,048 tokens/s" in metrics.summary()


def test_on_a_terminal_progress_is_a_bar_that_continues_where_the_run_does(tmp_path):
    stream = Terminal()
    metrics = open_metrics(tmp_path, last_step=6, stream=stream)
    record(metrics, 7, 8)
    metrics.close()
    shown = stream.getvalue()
    assert "\r" in shown and "step 6/10" in shown and "step 8/10" in shown
    assert "loss 0.6250" in shown and "2,048 tokens/s" in shown


def test_the_bar_can_be_switched_off_on_a_terminal(tmp_path):
    stream = Terminal()
    metrics = open_metrics(tmp_path, stream=stream, bar=False)
    record(metrics, 1)
    metrics.close()
    assert stream.getvalue().startswith("step 1/10 | loss 5.0000") and "\r" not in stream.getvalue()


def test_time_left_follows_the_clock_and_not_the_slow_first_step(monkeypatch):
    now = iter([100.0, 102.0, 104.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    stream = io.StringIO()
    progress = Progress(10, stream=stream)
    row = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1.0, "tokens_per_second": 1.0, "mfu": 0.5}
    for step, step_seconds in ((1, 60.0), (2, 1.0), (3, 1.0)):
        progress.show({"step": step, "step_seconds": step_seconds, **row})
    left = [line.split(" | ")[-1] for line in stream.getvalue().splitlines()]
    assert left == ["9 min 0 s left", "16.0 s left", "14.0 s left"]


def test_the_summary_is_one_line(tmp_path):
    metrics = open_metrics(tmp_path)
    assert metrics.summary() == "nothing was left to train"
    record(metrics, 1, validation_loss=4.0)
    record(metrics, 2)
    metrics.close()
    assert metrics.summary() == (
        "trained 2 steps in 1.0 s, 2,048 tokens in all: loss 2.5000, validation loss 4.0000, "
        "2,048 tokens/s, MFU 12.3%"
    )


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (41.26, "41.3 s"),
        (59.99, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.9, "1 h 0 min"),
        (18720, "5 h 12 min"),
        (198000, "2 d 7 h"),
    ],
)
def test_durations_are_told_in_two_units(seconds, words):
    assert seconds_in_words(seconds) == words
