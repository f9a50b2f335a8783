import gc
import struct

import numpy as np
import pytest

from megalite.data.error import DataError
from megalite.data.indexed_dataset import HEADER, IndexedDataset, bin_path, idx_path

GOLDEN_IDX = bytes.fromhex(
    "4d4d4944494458000001000000000000000803000000000000000400000000000000040000000300000002000000"
    "000000000000000008000000000000000e0000000000000000000000000000000100000000000000020000000000"
    "00000300000000000000"
)
GOLDEN_BIN = bytes.fromhex("010002000300000004000500000006000000")


def write_files(tmp_path, index, data):
    bin_path(tmp_path / "p").write_bytes(data)
    idx_path(tmp_path / "p").write_bytes(index)
    return tmp_path / "p"


def index_bytes(lengths, pointers, boundaries, code=8, version=1, magic=b"MMIDIDX\0\0"):
    head = HEADER.pack(magic, version, code, len(lengths), len(boundaries))
    rows = struct.pack(
        f"<{len(lengths)}i{len(pointers)}q{len(boundaries)}q", *lengths, *pointers, *boundaries
    )
    return head + rows


def test_the_golden_files_are_read(tmp_path):
    dataset = IndexedDataset(write_files(tmp_path, GOLDEN_IDX, GOLDEN_BIN))
    assert [dataset[i].tolist() for i in range(len(dataset))] == [[1, 2, 3, 0], [4, 5, 0], [6, 0]]
    assert dataset.dtype == np.uint16 and dataset.num_documents == 3 and dataset.num_tokens == 9
    assert dataset.get(0, 1, 2).tolist() == [2, 3] and dataset.get(1, 3).tolist() == []


@pytest.mark.parametrize("code, dtype", [(1, "u1"), (2, "i1"), (3, "i2"), (4, "i4"), (5, "i8"), (8, "u2")])
def test_every_integer_dtype_is_read(tmp_path, code, dtype):
    ids = np.array([7, 100, 3], dtype)
    prefix = write_files(tmp_path, index_bytes([1, 2], [0, ids.itemsize], [0, 1, 2], code), ids.tobytes())
    assert IndexedDataset(prefix)[1].tolist() == [100, 3]


def test_views_outlive_the_dataset(tmp_path):
    view = IndexedDataset(write_files(tmp_path, GOLDEN_IDX, GOLDEN_BIN))[1]
    gc.collect()
    assert view.tolist() == [4, 5, 0]


def test_documents_own_several_sequences_or_none(tmp_path):
    prefix = write_files(
        tmp_path, index_bytes([2, 1, 3], [0, 4, 6], [0, 2, 2, 3]), np.arange(6, dtype="<u2").tobytes()
    )
    dataset = IndexedDataset(prefix)
    assert [dataset.document(d).tolist() for d in range(3)] == [[0, 1, 2], [], [3, 4, 5]]


def test_an_empty_dataset_opens(tmp_path):
    dataset = IndexedDataset(write_files(tmp_path, index_bytes([], [], [0, 0]), b""))
    assert (len(dataset), dataset.num_documents, dataset.num_tokens) == (0, 1, 0)


def test_the_suffix_may_stand_in_the_prefix(tmp_path):
    prefix = write_files(tmp_path, GOLDEN_IDX, GOLDEN_BIN)
    assert IndexedDataset(f"{prefix}.bin").prefix == IndexedDataset(f"{prefix}.idx").prefix == str(prefix)


def test_a_sequence_outside_is_an_index_error(tmp_path):
    dataset = IndexedDataset(write_files(tmp_path, GOLDEN_IDX, GOLDEN_BIN))
    for bad in (
        lambda: dataset[3],
        lambda: dataset[-1],
        lambda: dataset.get(0, 3, 2),
        lambda: dataset.document(3),
    ):
        with pytest.raises(IndexError):
            bad()


GOOD = {"lengths": [2, 1], "pointers": [0, 4], "boundaries": [0, 1, 2]}
DAMAGE = {
    "magic": ({"magic": b"MMIDIDX\0\1"}, r"p\.idx: magic: expected .*found"),
    "version": ({"version": 2}, r"p\.idx: version: expected 1, found 2"),
    "dtype code": ({"code": 7}, r"p\.idx: dtype code: expected one of .*found 7"),
    "negative length": (
        {"lengths": [4, -1], "pointers": [0, 8]},
        r"length of sequence 1: expected at least 0, found -1",
    ),
    "pointer": ({"pointers": [0, 6]}, r"byte offset of sequence 1: expected 4, found 6"),
    "first pointer": ({"pointers": [2, 4]}, r"byte offset of sequence 0: expected 0, found 2"),
    "first boundary": ({"boundaries": [1, 1, 2]}, r"first document boundary: expected 0, found 1"),
    "last boundary": ({"boundaries": [0, 1, 1]}, r"last document boundary: expected 2, found 1"),
    "falling boundary": ({"boundaries": [0, 2, 1, 2]}, r"document boundary 2: expected at least 2, found 1"),
    "no boundary": ({"boundaries": []}, r"number of document boundaries: expected at least 1, found 0"),
}


@pytest.mark.parametrize("change, message", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_index_is_refused_in_one_line(tmp_path, change, message):
    with pytest.raises(DataError, match=message) as caught:
        IndexedDataset(write_files(tmp_path, index_bytes(**{**GOOD, **change}), bytes(6)))
    assert "\n" not in str(caught.value)


def test_the_undamaged_index_of_these_tests_opens(tmp_path):
    assert IndexedDataset(write_files(tmp_path, index_bytes(**GOOD), bytes(6))).num_tokens == 3


@pytest.mark.parametrize("size", [0, 20, 33, 101, 103])
def test_a_truncated_or_extended_index_is_refused(tmp_path, size):
    index = (GOLDEN_IDX + b"\0")[:size]
    with pytest.raises(DataError, match=rf"p\.idx: file size: expected .*found {size} bytes"):
        IndexedDataset(write_files(tmp_path, index, GOLDEN_BIN))


def test_a_multimodal_index_is_refused(tmp_path):
    with pytest.raises(DataError, match="multimodal"):
        IndexedDataset(write_files(tmp_path, GOLDEN_IDX + b"\0\0\0", GOLDEN_BIN))


@pytest.mark.parametrize(
    "data, what", [(GOLDEN_BIN[:-2], "truncated"), (GOLDEN_BIN + b"\0\0", "extended"), (b"", "trunc")]
)
def test_a_bin_of_another_size_is_refused(tmp_path, data, what):
    with pytest.raises(DataError, match=rf"p\.bin: file size: expected 18 bytes .*found {len(data)}: {what}"):
        IndexedDataset(write_files(tmp_path, GOLDEN_IDX, data))


@pytest.mark.parametrize("missing", [bin_path, idx_path])
def test_a_missing_file_is_one_clear_line(tmp_path, missing):
    prefix = write_files(tmp_path, GOLDEN_IDX, GOLDEN_BIN)
    missing(prefix).unlink()
    with pytest.raises(
        DataError, match=rf"{missing(prefix).name}: file: expected it to exist, found nothing"
    ):
        IndexedDataset(prefix)


def test_checks_run_over_block_borders(tmp_path, monkeypatch):
    monkeypatch.setattr("megalite.data.indexed_dataset._ROWS_AT_ONCE", 2)
    lengths, boundaries = [1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]
    pointers = [0, 2, 6, 12, 20]
    assert (
        len(IndexedDataset(write_files(tmp_path, index_bytes(lengths, pointers, boundaries), bytes(30)))) == 5
    )
    with pytest.raises(DataError, match="sequence 4: expected 20, found 22"):
        IndexedDataset(
            write_files(tmp_path, index_bytes(lengths, [*pointers[:4], 22], boundaries), bytes(30))
        )
    with pytest.raises(DataError, match="boundary 4: expected at least 4, found 3"):
        IndexedDataset(write_files(tmp_path, index_bytes(lengths, pointers, [0, 1, 2, 4, 3, 5]), bytes(30)))


def test_the_fingerprint_follows_the_content_and_not_the_path(tmp_path, write_dataset):
    first, same = write_dataset([[1, 2], [3]], "first"), write_dataset([[1, 2], [3]], "same")
    other = write_dataset([[1], [2, 3]], "other")
    assert first.fingerprint == same.fingerprint != other.fingerprint
