import numpy as np

from megalite.data.indexed_dataset import IndexedDataset
from megalite.data.indexed_writer import INT32, UINT16, IndexedDatasetWriter
from tools import merge_datasets


def write(prefix, documents, dtype=UINT16):
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for sequences in documents:
            writer.add_document([np.array(sequence, np.int64) for sequence in sequences])
    return str(prefix)


def test_documents_and_sequences_are_joined_in_the_order_given(tmp_path, capsys):
    a = write(tmp_path / "a", [[[1, 2], [3]], []])
    b = write(tmp_path / "b", [[[4]]])
    assert merge_datasets.main(["--input", f"{b}.idx", a, a, "--output-prefix", str(tmp_path / "m")]) == 0
    merged = IndexedDataset(tmp_path / "m")
    assert [merged.document(d).tolist() for d in range(5)] == [[4], [1, 2, 3], [], [1, 2, 3], []]
    assert merged.sequence_lengths.tolist() == [1, 2, 1, 2, 1]
    assert "5 documents, 7 tokens of uint16, from 3 datasets" in capsys.readouterr().out


def test_what_cannot_be_merged_is_one_line_and_leaves_nothing(tmp_path, capsys):
    a, wide = write(tmp_path / "a", [[[1]]]), write(tmp_path / "wide", [[[1]]], INT32)
    before = (tmp_path / "a.bin").stat().st_mtime_ns
    for inputs, output, message in (
        ([a, wide], "m", "wide.idx: dtype: expected uint16, found int32"),
        ([a, str(tmp_path / "no")], "m", "no.idx: file: expected it to exist"),
        ([a], "a", "output: expected another name than those of the inputs"),
    ):
        assert merge_datasets.main(["--input", *inputs, "--output-prefix", str(tmp_path / output)]) == 2
        [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert message in error
    assert not list(tmp_path.glob("*m*")) and (tmp_path / "a.bin").stat().st_mtime_ns == before
