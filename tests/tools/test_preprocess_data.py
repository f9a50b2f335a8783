import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow
import pytest
from pyarrow import parquet

from megalite.data import sources
from megalite.data.indexed_dataset import IndexedDataset
from megalite.data.indexed_writer import INT32
from tools import preprocess_data

ROOT = Path(__file__).resolve().parents[2]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def run(tmp_path, *inputs, more=()):
    common = ["--output-prefix", str(tmp_path / "out" / "p"), "--tokenizer", "bytes", "--workers", "0"]
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
    monkeypatch.setattr(sources, "BLOCK_BYTES", 700)
    written = []
    for workers in ("0", "1", "3"):
        assert run(tmp_path, source, more=["--workers", workers, "--append-eod"]) == 0
        written.append([(tmp_path / "out" / f"p_text_document.{end}").read_bytes() for end in ("bin", "idx")])
    assert written[0] == written[1] == written[2]
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
    monkeypatch.setattr(sources, "BLOCK_BYTES", 16)
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
        (["--workers", "-1"], "--workers: expected at least 0, found -1"),
        (["--max-bad-records", "-1"], "--max-bad-records: expected at least 0, found -1"),
        (["--max-record-mib", "0"], "--max-record-mib: expected at least 1, found 0"),
        (["--vocab-size", "0"], "--vocab-size: expected at least 1, found 0"),
        (["--vocab-size", "99"], "a.jsonl line 1: token id: expected 0 to 98, found 120"),
        (["--json-key", "body"], "a.jsonl line 1: no key 'body'; keys are 'text'"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, capsys, more, message):
    from megalite.tokenizer.load import build_byte_tokenizer

    build_byte_tokenizer().save(tmp_path / "tokenizer")
    more = [str(tmp_path / "tokenizer") if word == "TOKENIZER" else word for word in more]
    source = write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    assert message in refused(tmp_path, capsys, source, more=more)


def test_wrong_inputs_are_one_line(tmp_path, capsys):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.jsonl").touch()
    for name, message in (
        ("nowhere.jsonl", "nowhere.jsonl: input: expected a file or a folder, found nothing"),
        ("latin.txt", "latin.txt document 1: not UTF-8 at byte 3 (more than --max-bad-records 0"),
        ("empty.jsonl", "p_text_document: no tokens in 1 inputs"),
    ):
        assert message in refused(tmp_path, capsys, tmp_path / name)


def test_each_key_makes_a_dataset_of_its_own(tmp_path, capsys):
    source = write_lines(tmp_path / "a.jsonl", [{"q": "x", "a": "yz"}, {"q": "x"}, {"q": "", "a": "w"}])
    assert run(tmp_path, source, more=["--json-key", "q", "a", "--max-bad-records", "1"]) == 0
    assert documents(tmp_path, "p_q_document") == [b"x", b""]
    assert documents(tmp_path, "p_a_document") == [b"yz", b"w"]
    assert capsys.readouterr().out.count("2 documents") == 2


def test_inputs_of_all_kinds_are_joined_in_their_order(tmp_path):
    a = write_lines(tmp_path / "a.jsonl", [{"text": "plain"}])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(a.read_bytes().replace(b"plain", b"gzip")))
    parquet.write_table(pyarrow.table({"text": ["row 1", "row 2"]}), tmp_path / "c.parquet")
    (tmp_path / "d").mkdir()
    write_lines(tmp_path / "d" / "train.jsonl", [{"text": "folder"}])
    (tmp_path / "e.txt").write_text("text", encoding="utf-8")
    inputs = [tmp_path / name for name in ("e.txt", "d", "c.parquet", "b.jsonl.gz", "a.jsonl")]
    for workers in ("0", "2"):
        assert run(tmp_path, *inputs, more=["--workers", workers]) == 0
        assert documents(tmp_path) == [b"text", b"folder", b"row 1", b"row 2", b"gzip", b"plain"]


def test_a_missing_column_is_found_before_anything_is_encoded(tmp_path, capsys):
    good = write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "b.parquet")
    assert "b.parquet: no column 'text'; columns are 'body'" in refused(
        tmp_path, capsys, good, tmp_path / "b.parquet"
    )


def start(tmp_path, source):
    command = [sys.executable, "tools/preprocess_data.py", "--tokenizer", "bytes", "--workers", "2"]
    command += ["--input", str(source), "--output-prefix", str(tmp_path / "out" / "p")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def test_the_command_runs_as_a_script_and_shows_progress(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    out, err = (process := start(tmp_path, source)).communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in err, err
    assert "tokens/s" in err and "B/s" in err and "1 documents" in out


def test_a_worker_that_dies_is_one_line(tmp_path):
    process = start(tmp_path, write_lines(tmp_path / "a.jsonl", [{"text": "x" * 2000}] * 20_000))
    deadline = time.monotonic() + 60
    while not (tmp_path / "out").exists() or len(children := psutil.Process(process.pid).children()) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    next(child for child in children if "--multiprocessing-fork" in child.cmdline()).kill()
    _, err = process.communicate(timeout=60)
    [error] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2 and "a worker process died: perhaps out of memory" in error
    assert "Traceback" not in err and list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_nothing_that_looks_finished_and_the_next_says_so(tmp_path, capsys, how):
    source = write_lines(tmp_path / "a.jsonl", [{"text": "x" * 2000}] * 20_000)
    process = start(tmp_path, source)
    deadline = time.monotonic() + 60
    while not (written := list((tmp_path / "out").glob(".p*.bin.*.tmp"))) or not written[0].stat().st_size:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "Traceback" not in err, err
    assert list((tmp_path / "out").glob("p*")) == []
    small = write_lines(tmp_path / "b.jsonl", [{"text": "y"}])
    assert run(tmp_path, small) == 0 and documents(tmp_path) == [b"y"]
    again = "this run starts from the beginning" in capsys.readouterr().err
    assert again == (how == signal.SIGKILL)
    if how == signal.SIGINT:
        assert "interrupted: nothing was written, a new run starts from the beginning" in err
