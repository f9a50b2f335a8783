"""lilLM's path: a short one from end to end, and each of its promises broken."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import lillm
from tools.journey import JourneyError

ROOT = Path(lillm.__file__).parent.parent
SHORT = ("--steps", "4", "--corpus-bytes", "300000")
PNG = b"\x89PNG\r\n\x1a\n"


def run_lillm(folder, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/lillm.py", "--output", str(folder), *SHORT, *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def untaught(tmp_path_factory):
    """(folder, what it printed, its last error, its status) of runs of four steps, which teach nothing."""
    folder = tmp_path_factory.mktemp("lillm") / "short"
    done = run_lillm(folder, "--min-loss-drop", "0", "--min-accuracy", "0", "--min-right", "0")
    return folder, done.stdout, done.stderr.splitlines()[-1], done.returncode


def test_a_model_that_was_hardly_taught_does_not_keep_the_promises(untaught):
    """All trainings and the export work; what it says has no form, and that is told in one line."""
    folder, output, error, status = untaught
    assert status == 2, output
    assert error.startswith("error: a reply ")
    assert "[8/10]" in output and "[9/10]" not in output
    for run in ("pretrained", "tuned", "preferred"):
        assert (folder / run / "checkpoints" / "step-00000004").is_dir()


def test_every_stage_shows_its_command(untaught):
    _, output, *_ = untaught
    shown = [line.removeprefix("$ ") for line in output.splitlines() if line.startswith("$ ")]
    programs = [next(word for word in line.split() if word.endswith(".py")) for line in shown]
    assert programs == [
        *("tools/write_lessons.py", "tools/train_tokenizer.py", "tools/preprocess_data.py"),
        *("launchers/pretrain.py", "launchers/finetune.py", "launchers/prefer.py"),
        *("tools/convert_to_hf.py", "tools/generate.py"),
    ]
    assert shown[-1].endswith("/corpus/questions.txt")
    assert "2 ranks = tensor 1 x pipeline 1 x data 2; ZeRO-1" in output
    assert "2 ranks = tensor 2 x pipeline 1 x data 1, sequence parallel" in output
    assert "2 ranks = tensor 1 x pipeline 2 x data 1" in output
    assert "\nverified\n" in output


def test_the_margins_of_a_real_run_begin_at_nothing(untaught):
    folder, *_ = untaught
    rows = [json.loads(line) for line in (folder / "preferred/metrics.jsonl").read_text().splitlines()]
    assert abs(rows[0]["rewards/margins"]) < lillm.SAME_MARGIN < rows[-1]["rewards/margins"]
    assert "validation_rewards/accuracies" in rows[-1]


def test_the_export_has_the_chat_template_of_the_run(untaught):
    from transformers import AutoTokenizer

    folder, *_ = untaught
    tokenizer = AutoTokenizer.from_pretrained(folder / "exported")
    messages = [{"role": "user", "content": "What is 1 plus 1?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "User:\nWhat is 1 plus 1?\nAssistant:\n"


# Promises


def test_the_loss_of_validation_must_fall():
    assert lillm.check_validation_fell([2.0, 2.5, 0.5]).startswith("loss 2.00 at the first validation, 0.50")
    for last in (2.0, 2.5, float("nan")):
        with pytest.raises(JourneyError, match="a loss that falls was promised"):
            lillm.check_validation_fell([2.0, 1.0, last])


def test_margins_must_rise_from_nothing_and_held_out_pairs_be_told_apart():
    line = lillm.check_preferences([1e-6, 0.5, 2.0], 0.95, 0.9)
    assert (
        line == "margin of the rewards 0.00 at step 1, 2.00 at the last; 95% of the held-out pairs told right"
    )
    broken = [
        ([0.1, 2.0], 0.95),  # the reference is another model
        ([0.0, 0.0], 0.95),
        ([0.0, -1.0], 0.95),
        ([0.0, float("nan")], 0.95),
        ([0.0, 2.0], 0.5),
        ([0.0, 2.0], float("nan")),
    ]
    for margins, accuracy in broken:
        with pytest.raises(JourneyError, match="a margin that rises from 0, and 90% were promised"):
            lillm.check_preferences(margins, accuracy, 0.9)


# The command


def test_only_a_chat_is_replaced(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert lillm.main(["--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path} exists and is not a chat's: name another folder with --output\n"
    )


@pytest.mark.parametrize("option", ["--steps=0", "--min-right=much", "--min-accuracy=all"])
def test_a_wrong_argument_is_refused_in_one_line(option, capsys):
    with pytest.raises(SystemExit) as stop:
        lillm.main([option])
    name = option.partition("=")[0]
    assert stop.value.code == 2 and f"error: argument {name}: " in capsys.readouterr().err.splitlines()[-1]
