"""The command that measures a model, where it needs no harness."""

import json

import numpy as np
import pytest

from megalite.data.indexed_writer import UINT16, IndexedDatasetWriter
from megalite.evaluation.record import Evaluation
from tests.checkpoint.llamas import random_llama, save_llama, tiny_run
from tools import convert_to_hf, evaluate

TEXTS = ["a first document", "né", "x" * 100]


@pytest.fixture
def run_folder(tmp_path):
    run = tiny_run()
    save_llama(tmp_path / "run" / "checkpoints", random_llama(run.model), run)
    with IndexedDatasetWriter(tmp_path / "corpus", UINT16) as writer:
        for text in TEXTS:
            writer.add_document([np.array([*text.encode(), 256])])
    return tmp_path / "run"


def run_tool(run_folder, *extra: str) -> int:
    where = ["--checkpoint", str(run_folder), "--device", "cpu"]
    return evaluate.main([*where, "--perplexity", str(run_folder.parent / "corpus"), *extra])


def numbers(path) -> dict[str, float]:
    return {row.metric: row.value for row in Evaluation.read(path).measurements}


def test_perplexity_is_printed_and_recorded_in_the_folder_of_the_run(run_folder, capsys):
    assert run_tool(run_folder, "--context", "32") == 0
    captured = capsys.readouterr()
    num_tokens = sum(len(text.encode()) + 1 for text in TEXTS)
    assert f"predicted {num_tokens - 6} of {num_tokens} tokens in 3 documents" in captured.err
    found = numbers(run_folder / "evaluation.json")
    assert list(found) == ["loss", "perplexity", "byte_perplexity", "bits_per_byte"]
    assert f"{found['loss']:.4f}" in captured.out and "| corpus " in captured.out
    record = json.loads((run_folder / "evaluation.json").read_text())
    assert record["settings"]["context"] == 32 and record["origin"]["step"] == 10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_way_to_name_the_model_gives_the_same_numbers(run_folder, tmp_path, dtype):
    checkpoints, exported, output = run_folder / "checkpoints", tmp_path / "hf", tmp_path / "e.json"
    convert_to_hf.main(["--checkpoint", str(checkpoints), "--output", str(exported), "--dtype", dtype])
    assert run_tool(run_folder, "--dtype", dtype) == 0
    expected = numbers(run_folder / "evaluation.json")
    for place in (checkpoints, checkpoints / "step-00000010", exported):
        options = ["--checkpoint", str(place), "--dtype", dtype, "--output", str(output)]
        assert run_tool(run_folder, *options) == 0
        assert numbers(output) == expected


def test_a_folder_outside_a_run_gets_no_record_unless_one_is_named(run_folder, tmp_path, capsys):
    exported = tmp_path / "hf"
    convert_to_hf.main(["--checkpoint", str(run_folder / "checkpoints"), "--output", str(exported)])
    before = sorted(tmp_path.rglob("*.json"))
    assert run_tool(run_folder, "--checkpoint", str(exported)) == 0
    assert sorted(tmp_path.rglob("*.json")) == before


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--checkpoint", "absent"], "no checkpoint in absent"),
        (["--context", "100"], "--context: expected 2 to the model's 64 tokens, found 100"),
        (["--perplexity", "absent"], "absent.idx"),
    ],
)
def test_a_mistake_is_one_line(run_folder, capsys, extra, message):
    assert run_tool(run_folder, *extra) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
    assert not (run_folder / "evaluation.json").exists()


def test_a_tokenizer_larger_than_the_model_is_refused_with_both_numbers(run_folder, capsys, monkeypatch):
    monkeypatch.setattr("megalite.evaluation.subject.load_tokenizer", lambda name: Large())
    assert run_tool(run_folder) == 2
    assert "tokenizer large has 300 ids and the model 257" in capsys.readouterr().err


class Large:
    name, vocab_size, eos_token = "large", 300, None


@pytest.mark.parametrize("options", [[], ["--perplexity", "p", "--limit", "0"]])
def test_a_command_line_that_asks_for_nothing_is_refused(options):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--checkpoint", "c", *options])
    assert stop.value.code == 2
