import numpy as np
import pytest

from megalite.data.indexed_dataset import IndexedDataset
from megalite.data.indexed_writer import INT32, UINT16
from tools import import_tokens


def write(path, ids, dtype="<u2"):
    np.array(ids, dtype).tofile(path)
    return path


def run(tmp_path, *arguments):
    return import_tokens.main([*map(str, arguments), "--output-prefix", str(tmp_path / "out" / "p")])


def documents(tmp_path):
    dataset = IndexedDataset(tmp_path / "out" / "p")
    return [dataset.document(index).tolist() for index in range(dataset.num_documents)]


FLAT = ("--format", "flat", "--dtype", "uint16", "--eos-token-id", "0", "--eos-position", "end")


def test_flat_files_are_joined_and_stay_as_they_are(tmp_path, capsys):
    files = [write(tmp_path / "a.bin", [1, 2, 0, 3, 0]), write(tmp_path / "b.bin", [0, 4, 5])]
    before = [path.read_bytes() for path in files]
    assert run(tmp_path, *FLAT, "--vocab-size", 6, "--input", *files) == 0
    assert documents(tmp_path) == [[1, 2, 0], [3, 0], [0], [4, 5]]
    assert [path.read_bytes() for path in files] == before
    assert IndexedDataset(tmp_path / "out" / "p").dtype == UINT16
    assert "4 documents, 8 tokens of uint16" in capsys.readouterr().out


def test_a_large_vocabulary_needs_int32(tmp_path):
    path = write(tmp_path / "a.npy", [70_000, 0, 2, 0], "<u4")
    options = ("--format", "flat", "--dtype", "uint32", "--eos-token-id", "0", "--eos-position", "end")
    assert run(tmp_path, *options, "--vocab-size", 100_000, "--input", path) == 0
    assert IndexedDataset(tmp_path / "out" / "p").dtype == INT32
    assert documents(tmp_path) == [[70_000, 0], [2, 0]]


def test_a_whole_file_is_one_document_in_sequences_of_bearable_length(tmp_path, monkeypatch):
    monkeypatch.setattr(import_tokens, "SEQUENCE_TOKENS", 4)
    path = write(tmp_path / "a.bin", range(1, 11))
    options = ("--format", "flat", "--dtype", "uint16", "--eos-position", "none")
    assert run(tmp_path, *options, "--vocab-size", 20, "--input", path) == 0
    assert documents(tmp_path) == [list(range(1, 11))]
    assert IndexedDataset(tmp_path / "out" / "p").sequence_lengths.tolist() == [4, 4, 2]


def test_datatrove_files_bring_their_documents(tmp_path):
    write(tmp_path / "x.ds", [1, 2, 0, 3, 0])
    write(tmp_path / "x.ds.index", [3, 3, 5], "<u8")
    (tmp_path / "x.ds.metadata").write_text("gpt2|2\n5")
    assert run(tmp_path, "--format", "datatrove", "--vocab-size", 6, "--input", tmp_path / "x.ds") == 0
    assert documents(tmp_path) == [[1, 2, 0], [], [3, 0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--format", "flat", "--vocab-size", 6), "--dtype: expected uint16 or uint32 for flat files"),
        (("--format", "flat", "--dtype", "uint16", "--vocab-size", 6), "--eos-position: expected end, start"),
        (("--format", "llmc", "--vocab-size", 6), "--eos-position: expected end, start or none for llmc"),
        (("--format", "llmc", "--dtype", "uint16", "--vocab-size", 6), "--dtype: expected none, as llm.c"),
        (
            ("--format", "datatrove", "--vocab-size", 6, "--eos-token-id", 0),
            "FILE.ds.index has the documents",
        ),
        (("--format", "datatrove", "--vocab-size", 0), "--vocab-size: expected at least 1, found 0"),
        ((*FLAT, "--vocab-size", 3), "at token 3: token id: expected 0 to 2, found 3"),
        (
            (*FLAT[:-1], "none", "--vocab-size", 6),
            "--eos-token-id: expected an id for positions start and end",
        ),
        ((*FLAT, "--vocab-size", 6, "--input", "nowhere.bin"), "nowhere.bin: file: expected it to exist"),
    ],
)
def test_wrong_arguments_are_one_line_and_leave_nothing(tmp_path, capsys, arguments, message):
    path = write(tmp_path / "a.bin", [1, 2, 0, 3, 0])
    assert run(tmp_path, "--input", path, *arguments) == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in error
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []
