import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.error import DataError
from megalite.data.indexed_dataset import IndexedDataset, bin_path, idx_path
from megalite.data.indexed_writer import INT32, UINT16, IndexedDatasetWriter, dtype_for, merge_datasets
from tests.data.test_indexed_dataset import GOLDEN_BIN, GOLDEN_IDX


def files(prefix):
    return bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes()


def test_the_golden_files_are_written(golden):
    data, index = files(golden.prefix)
    assert (data, index) == (GOLDEN_BIN, GOLDEN_IDX)
    assert hashlib.sha256(index).hexdigest().startswith("673bc9f9d23fe11a")


def test_a_pair_is_on_the_disk(synced, golden):
    paths = (bin_path(golden.prefix), idx_path(golden.prefix), bin_path(golden.prefix).parent)
    assert {path.stat().st_ino for path in paths} <= synced


def test_documents_of_several_sequences_and_empty_ones_are_kept(tmp_path):
    with IndexedDatasetWriter(tmp_path / "p") as writer:
        writer.add_document([[1, 2], [], [3]])
        writer.add_document([])
        writer.add_document([[4]])
    dataset = IndexedDataset(tmp_path / "p")
    assert dataset.document_indices.tolist() == [0, 2, 2, 3]
    assert dataset.sequence_lengths.tolist() == [2, 1, 1]


@settings(max_examples=25, deadline=None)
@given(documents=st.lists(st.lists(st.integers(0, 65535), max_size=4), max_size=8), cut=st.integers(0, 8))
def test_many_documents_at_once_and_merged_parts_equal_one_by_one(tmp_path_factory, documents, cut):
    folder = tmp_path_factory.mktemp("p")
    with IndexedDatasetWriter(folder / "single") as writer:
        for document in documents:
            writer.add_document([document])
    parts = {"all": documents, "a": documents[:cut], "b": documents[cut:]}
    for name, part in parts.items():
        with IndexedDatasetWriter(folder / name) as writer:
            writer.add_documents(
                np.concatenate([[], *part]).astype(np.int64),
                np.array([len(d) for d in part], np.int64),
            )
    merge_datasets([folder / "a", folder / "b"], folder / "merged")
    assert files(folder / "single") == files(folder / "all") == files(folder / "merged")


def test_merging_in_another_order_gives_other_files(tmp_path, write_dataset):
    a, b = write_dataset([[1, 2]], "a"), write_dataset([[3]], "b")
    merge_datasets([a.prefix, b.prefix], tmp_path / "ab")
    merge_datasets([b.prefix, a.prefix], tmp_path / "ba")
    assert IndexedDataset(tmp_path / "ab").tokens.tolist() == [1, 2, 3]
    assert files(tmp_path / "ab") != files(tmp_path / "ba")


def test_parts_of_different_dtypes_are_not_merged(tmp_path, write_dataset):
    a, b = write_dataset([[1]], "a"), write_dataset([[1]], "b", INT32)
    with pytest.raises(DataError, match=r"b\.idx: dtype: expected uint16, found int32"):
        merge_datasets([a.prefix, b.prefix], tmp_path / "ab")
    assert not bin_path(tmp_path / "ab").exists()


@pytest.mark.parametrize("bad", [-1, 65536, 70000])
def test_an_id_that_does_not_fit_is_named_and_nothing_is_left_behind(tmp_path, bad):
    with (
        pytest.raises(DataError, match=rf"document 1: token id: expected 0 to 65535, found {bad}"),
        IndexedDatasetWriter(tmp_path / "p") as writer,
    ):
        writer.add_document([[65535]])
        writer.add_document([[3, bad]])
    assert list(tmp_path.iterdir()) == []


def test_large_ids_fit_into_int32(write_dataset):
    assert write_dataset([[70000]], dtype=INT32)[0].tolist() == [70000]


def test_floats_and_lengths_that_do_not_add_up_are_refused(tmp_path):
    with IndexedDatasetWriter(tmp_path / "p") as writer:
        with pytest.raises(DataError, match="row of integers, found float64"):
            writer.add_document([[1.5]])
        with pytest.raises(DataError, match="expected a sum of 2 tokens, found 3"):
            writer.add_documents(np.array([1, 2]), np.array([3]))
        with pytest.raises(DataError, match="at least 0, found -1"):
            writer.add_documents(np.array([1, 2]), np.array([3, -1]))
    with pytest.raises(DataError, match="expected uint8, uint16 or int32, found int64"):
        IndexedDatasetWriter(tmp_path / "q", np.int64)


def test_a_failure_leaves_the_old_files_alone(tmp_path, golden):
    before = files(golden.prefix)
    with pytest.raises(RuntimeError), IndexedDatasetWriter(golden.prefix) as writer:
        writer.add_document([[9, 9]])
        raise RuntimeError("power cut")
    assert files(golden.prefix) == before
    assert len(list(tmp_path.iterdir())) == 2


def test_a_crash_between_the_renames_never_shows_an_index_of_other_data(tmp_path, golden, monkeypatch):
    old_view = golden[0]
    writer = IndexedDatasetWriter(golden.prefix)
    writer.add_document([[9] * 9])  # as many bytes as the old data: sizes alone would not tell
    real, calls = type(tmp_path).replace, []

    def replace(self, target):
        calls.append(str(target))
        if len(calls) == 2:
            raise OSError("crash")
        return real(self, target)

    monkeypatch.setattr(type(tmp_path), "replace", replace)
    with pytest.raises(OSError, match="crash"):
        writer.publish()
    assert calls == [f"{golden.prefix}.bin", f"{golden.prefix}.idx"]
    with pytest.raises(DataError, match=r"\.idx: file"):
        IndexedDataset(golden.prefix)
    assert old_view.tolist() == [1, 2, 3, 0]
    writer.discard()


def test_the_dtype_follows_megatrons_limit():
    assert [dtype_for(size) for size in (257, 65_499, 65_500)] == [UINT16, UINT16, INT32]
