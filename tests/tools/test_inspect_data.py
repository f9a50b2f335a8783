import numpy as np
import pytest

from megalite.data.indexed_writer import INT32, UINT16, IndexedDatasetWriter
from tools import inspect_data


@pytest.fixture
def prefix(tmp_path):
    """Three documents of bytes: one in two sequences, one empty, one without an end of text."""
    with IndexedDatasetWriter(tmp_path / "data", UINT16) as writer:
        writer.add_document([list(b"ab"), [*b"c", 256]])
        writer.add_document([])
        writer.add_document([list(b"defgh" * 20)])
    return str(tmp_path / "data")


def inspect(capsys, *arguments):
    status = inspect_data.main(list(arguments))
    return status, capsys.readouterr()


def test_header_counts_and_lengths_are_shown(capsys, prefix):
    status, shown = inspect(capsys, f"{prefix}.idx")
    assert status == 0
    for line in (
        f"{prefix}.bin: 208 bytes",
        f"{prefix}.idx: 102 bytes",
        "uint16, little endian",
        "documents    3, 1 of them empty",
        "sequences    3",
        "tokens       104",
        "2 to 100 tokens per sequence, median 2, mean 34.7",
        "2 to 3 | ######################################## 2",
        "64 to 127 | ####################                     1",
        "verdict: sound, as far as the index tells; --verify reads the ids too",
    ):
        assert line in shown.out


def test_samples_are_decoded(capsys, prefix):
    _, shown = inspect(capsys, prefix, "--tokenizer", "bytes")
    assert "document 0: 'abc<|endoftext|>'" in shown.out and "document 1: ''" in shown.out
    assert "document 2: 'defghdefgh" in shown.out and "and 36 more tokens" in shown.out
    _, shown = inspect(capsys, prefix, "--tokenizer", "bytes", "--samples", "0")
    assert "document 0" not in shown.out


def test_verification_reads_every_id(capsys, prefix, monkeypatch):
    monkeypatch.setattr(inspect_data, "BLOCK_TOKENS", 3)
    status, shown = inspect(capsys, prefix, "--tokenizer", "bytes", "--verify")
    assert status == 0 and "largest id   256" in shown.out
    assert "end of text  1 of 2 documents with tokens end with id 256" in shown.out
    assert shown.out.splitlines()[-1] == "verdict: sound: the index fits, and every id is below 257"
    status, shown = inspect(capsys, prefix, "--verify")
    assert status == 0 and "verdict: sound, but no vocabulary was named" in shown.out
    status, shown = inspect(capsys, prefix, "--vocab-size", "256", "--verify")
    assert status == 2 and shown.out.splitlines()[-1] == "verdict: NOT sound"
    assert "data.bin: ids: expected 0 to 255, found id 256 at token 3: 1 such ids" in shown.err


def test_a_negative_id_is_never_sound(capsys, tmp_path):
    with IndexedDatasetWriter(tmp_path / "data", INT32) as writer:
        writer.add_document([[1, 2, 3]])
    np.array([1, -2, 3], "<i4").tofile(tmp_path / "data.bin")
    status, shown = inspect(capsys, str(tmp_path / "data"), "--verify")
    assert status == 2 and "expected at least 0, found id -2 at token 1" in shown.err


def test_a_damaged_file_is_not_sound(capsys, prefix, tmp_path):
    (tmp_path / "data.bin").write_bytes(b"x" * 207)
    status, shown = inspect(capsys, prefix)
    assert status == 2 and shown.out == "verdict: NOT sound\n"
    assert shown.err.count("\n") == 1 and "data.bin: file size: expected 208 bytes" in shown.err


def test_ids_outside_the_tokenizer_are_shown_as_such(capsys, tmp_path):
    with IndexedDatasetWriter(tmp_path / "data", UINT16) as writer:
        writer.add_document([[97, 9999]])
    _, shown = inspect(capsys, str(tmp_path / "data"), "--tokenizer", "bytes")
    assert "<ids outside the tokenizer's 257: [97, 9999] ...>" in shown.out


def test_an_empty_dataset_can_be_inspected(capsys, tmp_path):
    with IndexedDatasetWriter(tmp_path / "data"):
        pass
    more = ("--tokenizer", "bytes", "--verify", "--plot", str(tmp_path / "x.png"))
    status, shown = inspect(capsys, str(tmp_path / "data"), *more)
    assert status == 0 and "documents    0" in shown.out and "verdict: sound" in shown.out


def test_the_lengths_are_drawn(capsys, prefix, tmp_path):
    pytest.importorskip("matplotlib")
    status, shown = inspect(capsys, prefix, "--plot", str(tmp_path / "plots" / "x.png"))
    assert status == 0 and (tmp_path / "plots" / "x.png").read_bytes().startswith(b"\x89PNG")
    assert "x.png" in shown.out


def test_wrong_arguments_are_one_line(capsys, prefix):
    for arguments in (["--tokenizer", "no/where/at/all"], ["--samples", "-1"], ["--vocab-size", "-5"]):
        status, shown = inspect(capsys, prefix, *arguments)
        assert status == 2 and shown.err.startswith("error: ") and shown.err.count("\n") == 1
        assert "verdict" not in shown.out
