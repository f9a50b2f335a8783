"""The demo: a tiny one from end to end, and each of its promises broken."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import demo
from tools.journey import JourneyError, make_room

ROOT = Path(demo.__file__).parent.parent
PNG = b"\x89PNG\r\n\x1a\n"


def run_demo(folder, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/demo.py", "--output", str(folder), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(folder, what it printed) of a demo of a few steps."""
    folder = tmp_path_factory.mktemp("demo") / "tiny"
    done = run_demo(folder, "--steps", "4", "--corpus-bytes", "600000", "--min-loss-drop", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_every_stage_shows_its_command_and_keeps_its_promise(tiny):
    _, output = tiny
    for stage in range(1, demo.NUM_STAGES + 1):
        assert f"\n[{stage}/{demo.NUM_STAGES}] " in output
    shown = [line.split()[1:3] for line in output.splitlines() if line.startswith("$ ")]
    tools = ["train_tokenizer", "preprocess_data", "convert_to_hf", "generate", "generate", "plot_run"]
    expected = [["python", f"tools/{name}.py"] for name in tools]
    expected.insert(0, ["python", "-c"])
    expected[3:3] = [["deepspeed", "--quiet"]] * 2
    assert shown == expected
    assert "4 ranks = tensor 2 x pipeline 1 x data 2, sequence parallel; ZeRO-3" in output
    assert "4 ranks = tensor 2 x pipeline 2 x data 1, sequence parallel, 1f1b schedule; ZeRO-3" in output
    assert "\nthe same curve\n" in output and "\nverified\n" in output
    assert "transformers gives the same logits, to 0.0001" in output
    assert all(f"\n{prompt}" in output for prompt in demo.PROMPTS) and "\nDone in " in output


def test_everything_lies_where_it_says(tiny):
    folder, output = tiny
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and "validation_loss" in rows[-1]
    assert (folder / "metrics.png").read_bytes().startswith(PNG)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000004"]
    for name in ("corpus/python_text_document.idx", "tokenizer/tokenizer.json", "hf/model.safetensors"):
        assert (folder / name).stat().st_size > 0
    assert not (folder / "pipeline" / "checkpoints").exists()
    assert f"Everything lies in {folder}" in output


def test_the_exported_folder_speaks_in_transformers(tiny):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = tiny
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    model = AutoModelForCausalLM.from_pretrained(folder / "hf")
    ids = tokenizer("import os", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "import os"
    assert model.generate(ids, max_new_tokens=3).shape == (1, ids.size(1) + 3)


def test_a_stage_that_fails_ends_the_demo_in_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(demo, "NUM_PROCESSES", 3)
    assert demo.main(["--output", str(tmp_path / "demo"), "--steps", "4", "--corpus-bytes", "300000"]) == 2
    output, error = capfd.readouterr()
    assert "Traceback" not in error and "[5/8]" not in output
    assert "error: 3 processes cannot be divided into tp_size 2 x pp_size 1" in error
    last = error.splitlines()[-1]
    assert last.startswith("error: stage 4 of 8 (Training: ") and last.endswith("and said why above")


# Promises


def test_the_pipeline_must_follow_the_curve():
    assert demo.check_same_curve([3.0, 2.0, 1.0], [3.0, 2.0 + 1e-5]).endswith("the same curve")
    for other in (2.01, float("nan")):
        with pytest.raises(JourneyError, match=r"step 2: losses 2\.000000 and, in a pipeline"):
            demo.check_same_curve([3.0, 2.0, 1.0], [3.0, other])


def test_logits_must_agree():
    line = "largest difference of a logit, transformers against megalite: {} (largest logit: 9)\nverified\n"
    assert demo.check_logits(line.format("3e-06")).endswith("to 0.0001")
    for report in (line.format("0.0002"), line.format("nan"), "verified"):
        with pytest.raises(JourneyError, match="logits of transformers differ"):
            demo.check_logits(report)


# The command


def test_only_a_demo_is_replaced(tmp_path, capsys):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    assert demo.main(["--output", str(theirs)]) == 2
    assert capsys.readouterr().err == (
        f"error: {theirs} exists and is not a demo's: name another folder with --output\n"
    )
    assert (theirs / "thesis.txt").exists()

    earlier = tmp_path / "earlier"
    (earlier / "corpus").mkdir(parents=True)
    make_room(earlier, "demo")
    assert not earlier.exists()


def test_more_steps_than_the_corpus_has_text_for_are_refused(tmp_path, capsys):
    options = ["--output", str(tmp_path / "demo"), "--corpus-bytes", "300000", "--steps", "100000"]
    assert demo.main(options) == 2
    assert "error: --steps 100000: the corpus has text for " in capsys.readouterr().err


@pytest.mark.parametrize("steps", ["0", "-1", "x"])
def test_a_number_out_of_range_is_refused(steps, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(["--steps", steps])
    assert stop.value.code == 2 and f"{steps!r} is not a whole number above 0" in capsys.readouterr().err
