"""The laptop's run: a short one from end to end, and each of its promises broken."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import laptop

ROOT = Path(laptop.__file__).parent.parent
SHORT = ("--steps", "4", "--corpus-bytes", "300000")
PNG = b"\x89PNG\r\n\x1a\n"


def run_laptop(folder, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/laptop.py", "--output", str(folder), *SHORT, *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """(folder, what it printed) of a run of a few steps, of which little is expected."""
    folder = tmp_path_factory.mktemp("laptop") / "short"
    done = run_laptop(folder, "--min-loss-drop", "0", "--min-known", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_every_stage_shows_its_command(short):
    _, output = short
    for stage in range(1, laptop.NUM_STAGES + 1):
        assert f"\n[{stage}/{laptop.NUM_STAGES}] " in output
    shown = [line.split()[1:3] for line in output.splitlines() if line.startswith("$ ")]
    tools = ["write_prose", "train_tokenizer", "preprocess_data", "plot_run", "generate", "generate"]
    expected = [["python", f"tools/{name}.py"] for name in tools]
    expected.insert(3, ["deepspeed", "--quiet"])
    assert shown == expected
    assert "2 ranks = tensor 1 x pipeline 1 x data 2" in output


def test_it_ends_with_the_losses_the_texts_and_where_everything_lies(short):
    folder, output = short
    assert all(f"\n{prompt}" in output for prompt in laptop.PROMPTS)
    end = output[output.index("\nDone in ") :]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert f"loss {rows[0]['loss']:.2f} at step 1" in end
    assert f"loss {rows[-1]['validation_loss']:.2f} at the end on text that was not trained on" in end
    assert "of the letters lie in words of the corpus" in end and f"Everything lies in {folder}" in end
    assert (folder / "metrics.png").read_bytes().startswith(PNG)
    for name in ("corpus/prose_text_document.idx", "tokenizer/tokenizer.json", "checkpoints/step-00000004"):
        assert (folder / name).exists()


def test_a_loss_that_did_not_fall_as_expected_ends_the_run_in_one_line(tmp_path):
    done = run_laptop(tmp_path / "broken", "--min-loss-drop", "9")
    assert done.returncode == 2 and "[5/6]" not in done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: loss ") and last.endswith("nats less, and more than 9 were promised")


# Promises


def test_the_loss_must_fall_on_other_text_as_well():
    assert laptop.check_validation(3.9, 7.6, 3) == "loss 3.90 at the end on text that was not trained on"
    for loss in (4.6, 7.6, float("nan")):
        with pytest.raises(laptop.JourneyError, match=r"more than 3 nats below 7\.60 were promised"):
            laptop.check_validation(loss, 7.6, 3)


KNOWN = {"the", "file", "is", "read", "from", "a", "path"}


def test_words_of_the_corpus_are_counted_by_their_letters():
    line = laptop.check_words(["The file is read,", " from a PATH."], KNOWN, 0.8)
    assert line == "100% of the letters lie in words of the corpus, and 100% of the words differ"
    line = laptop.check_words(["the file is qqqq"], KNOWN, 0.6)
    assert line.startswith("69% of the letters")


@pytest.mark.parametrize(
    "text",
    [
        "cont message convertureruet donceptias attribute kinditue encodimum",  # tokens drawn blindly
        "the the the the the the the the",
        "(((( 1234 ))))",
        "",
    ],
)
def test_a_broken_model_is_noticed(text):
    with pytest.raises(laptop.JourneyError, match="at least 80% and 25% were promised"):
        laptop.check_words([text], KNOWN | {"message", "attribute"}, laptop.MIN_KNOWN)


def test_the_words_of_a_corpus_are_those_of_its_texts(tmp_path):
    corpus = tmp_path / "prose.jsonl"
    corpus.write_text('{"text": "Don\'t read\\nit_twice", "path": "unseen"}\n{"text": "Read 2 files."}\n')
    assert laptop.read_words(corpus) == {"don", "t", "read", "it", "twice", "files"}


# The command


def test_only_a_laptop_run_is_replaced(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert laptop.main(["--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path} exists and is not a laptop run's: name another folder with --output\n"
    )


@pytest.mark.parametrize("option", ["--steps=0", "--corpus-bytes=x", "--min-known=much"])
def test_a_wrong_argument_is_refused_in_one_line(option, capsys):
    with pytest.raises(SystemExit) as stop:
        laptop.main([option])
    name = option.partition("=")[0]
    assert stop.value.code == 2 and f"error: argument {name}: " in capsys.readouterr().err.splitlines()[-1]


def test_a_corpus_that_is_too_small_for_any_text_is_refused_in_one_line(tmp_path, capfd):
    assert laptop.main(["--output", str(tmp_path / "none"), "--corpus-bytes", "1"]) == 2
    *_, reason, last = capfd.readouterr().err.splitlines()
    assert reason.endswith("error: no prose of at most 1 bytes found here: raise --max-bytes")
    assert last.startswith("error: stage 1 of 6 (Text: ")
