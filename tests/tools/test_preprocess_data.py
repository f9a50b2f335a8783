import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megalite.data.indexed_dataset import IndexedDataset
from megalite.data.indexed_writer import INT32
from tools import preprocess_data

ROOT = Path(__file__).resolve().parents[2]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def run(tmp_path, *inputs, more=()):
    common = ["--output-prefix", str(tmp_path / "out" / "p"), "--tokenizer", "bytes", "--workers", "1"]
    return preprocess_data.main(["--input", *map(str, inputs), *common, *more])


def documents(tmp_path, name="p_text_document"):
    dataset = IndexedDataset(tmp_path / "out" / name)
    return [bytes(dataset.document(d).astype("u1")) for d in range(dataset.num_documents)]


def refused(tmp_path, capsys, *inputs, more=()):
    """The one line that a refused command prints; nothing may be left behind."""
    assert run(tmp_path, *inputs, more=more) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []
    [error] = errors
    return error


def test_documents_keep_their_order_and_empty_ones_stay(tmp_path, capsys):
    a = write_lines(tmp_path / "a.jsonl", [{"text": "one"}, {"text": ""}, {"text": "two"}])
    (tmp_path / "b.txt").write_text("all\nof it", encoding="utf-8")
    assert run(tmp_path, a, tmp_path / "b.txt") == 0
    assert documents(tmp_path) == [b"one", b"", b"two", b"all\nof it"]
    assert "4 documents, 15 tokens of uint16" in capsys.readouterr().out


def test_workers_and_chunks_do_not_change_a_byte(tmp_path, monkeypatch):
    source = write_lines(tmp_path / "a.jsonl", [{"text": f"{i} " * (i % 50)} for i in range(400)])
    split = preprocess_data.split_files
    monkeypatch.setattr(preprocess_data, "split_files", lambda paths: split(paths, chunk_bytes=700))
    written = []
    for workers in ("1", "3"):
        assert run(tmp_path, source, more=["--workers", workers, "--append-eod"]) == 0
        written.append([(tmp_path / "out" / f"p_text_document.{end}").read_bytes() for end in ("bin", "idx")])
    assert written[0] == written[1]
    dataset = IndexedDataset(tmp_path / "out" / "p_text_document")
    assert dataset.document(7).tolist() == [*(b"7 " * 7), 256] and dataset.num_documents == 400


def test_the_json_key_names_the_output(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [{"body": "x", "text": 3}])
    assert run(tmp_path, source, more=["--json-key", "body"]) == 0
    assert documents(tmp_path, "p_body_document") == [b"x"]


def test_a_large_vocabulary_needs_int32(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    assert run(tmp_path, source, more=["--vocab-size", "65500"]) == 0
    assert IndexedDataset(tmp_path / "out" / "p_text_document").dtype == INT32


def test_bad_records_are_named_by_file_and_line(tmp_path, capsys, monkeypatch):
    source = tmp_path / "a.jsonl"
    source.write_text(
        '{"text": "a"}\n{"text": "b"}\n{"text": 3}\nnonsense\n{"text": "c"}\n', encoding="utf-8"
    )
    split = preprocess_data.split_files
    monkeypatch.setattr(preprocess_data, "split_files", lambda paths: split(paths, chunk_bytes=16))
    assert "a.jsonl line 3: key 'text': expected text, found int (more than --max-bad" in refused(
        tmp_path, capsys, source
    )
    assert "line 3" in refused(tmp_path, capsys, source, more=["--max-bad-records", "1"])
    assert run(tmp_path, source, more=["--max-bad-records", "2"]) == 0
    assert "left out 2 bad records; the first: " in capsys.readouterr().err
    assert documents(tmp_path) == [b"a", b"b", b"c"]


@pytest.mark.parametrize(
    "more, message",
    [
        (["--tokenizer", "nowhere"], "nowhere: no such file or folder"),
        (["--eos-token", "</s>", "--tokenizer", "TOKENIZER"], "eos token '</s>' is not in the vocabulary"),
        (["--workers", "0"], "--workers: expected at least 1, found 0"),
        (["--vocab-size", "0"], "--vocab-size: expected at least 1, found 0"),
        (["--vocab-size", "99"], "a.jsonl line 1: token id: expected 0 to 98, found 120"),
        (["--json-key", "body"], "a.jsonl line 1: no key 'body'; keys are 'text'"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, capsys, more, message):
    from megalite.tokenizer.tokenizer import build_byte_tokenizer

    build_byte_tokenizer().save(tmp_path / "tokenizer")
    more = [str(tmp_path / "tokenizer") if word == "TOKENIZER" else word for word in more]
    source = write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    assert message in refused(tmp_path, capsys, source, more=more)


def test_wrong_inputs_are_one_line(tmp_path, capsys):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.jsonl").touch()
    assert "nowhere.jsonl: input: expected a file, found nothing" in refused(
        tmp_path, capsys, tmp_path / "nowhere.jsonl"
    )
    assert "latin.txt: text: expected UTF-8" in refused(tmp_path, capsys, tmp_path / "latin.txt")
    assert "no tokens in 1 input files" in refused(tmp_path, capsys, tmp_path / "empty.jsonl")


def test_the_command_runs_as_a_script_and_shows_progress(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    command = [sys.executable, "tools/preprocess_data.py", "--tokenizer", "bytes", "--workers", "2"]
    command += ["--input", str(source), "--output-prefix", str(tmp_path / "p")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "tokens/s" in done.stderr and "B/s" in done.stderr and "1 documents" in done.stdout
