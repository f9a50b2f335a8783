import gc
import mmap
import os

import numpy as np
import pytest

from megalite.data import token_file
from megalite.data.error import DataError
from megalite.data.gpt_dataset import GPTDataset
from megalite.data.indexed_dataset import IndexedDataset, bin_path
from megalite.data.token_file import TokenFile, open_bytes, open_tokens


@pytest.fixture
def no_maps(monkeypatch):
    """A file system that refuses every map."""

    def refuse(*arguments, **options):
        raise OSError(19, "No such device")

    monkeypatch.setattr(mmap, "mmap", refuse)


@pytest.fixture
def short_reads(monkeypatch):
    """Reads that give at most 3 bytes."""
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: pread(file, min(size, 3), offset))


def test_what_cannot_be_mapped_is_read_with_the_same_values(golden, no_maps, short_reads):
    read = IndexedDataset(golden.prefix)
    assert isinstance(read.tokens, TokenFile) and not isinstance(golden.tokens, TokenFile)
    assert [read[i].tolist() for i in range(3)] == [golden[i].tolist() for i in range(3)]
    assert read.document(1).tolist() == [4, 5, 0] and read.num_tokens == 9
    assert read.fingerprint == golden.fingerprint
    mapped, unmapped = GPTDataset(golden, 2, 9, 1), GPTDataset(read, 2, 9, 1)
    assert [unmapped[i].tolist() for i in range(9)] == [mapped[i].tolist() for i in range(9)]


def test_ids_read_stay_when_the_dataset_is_gone(golden, no_maps):
    ids = IndexedDataset(golden.prefix)[1]
    gc.collect()
    assert ids.tolist() == [4, 5, 0]


def test_slices_are_those_of_an_array(tmp_path):
    ids = np.arange(10, dtype=np.int32)
    (tmp_path / "ids").write_bytes(ids.tobytes())
    read = TokenFile(tmp_path / "ids", ids.dtype)
    parts = [slice(None), slice(3), slice(4, 7), slice(8, 99), slice(7, 2), slice(0, 10, 3), slice(-2, None)]
    assert [read[part].tolist() for part in parts] == [ids[part].tolist() for part in parts]
    assert (len(read), read.nbytes) == (10, 40)


def test_a_file_cut_while_it_is_read_is_an_error_and_never_garbage(golden, no_maps):
    read = IndexedDataset(golden.prefix)
    os.truncate(bin_path(golden.prefix), 10)
    with pytest.raises(DataError, match=r"data\.bin: expected 4 bytes more at byte 10, found its end"):
        read[1]


def test_an_empty_file_is_an_empty_array(tmp_path):
    (tmp_path / "none").touch()
    assert open_bytes(tmp_path / "none").tolist() == []
    assert open_tokens(tmp_path / "none", np.dtype("<u2"), 0).tolist() == []


def test_what_stands_in_the_way_is_named_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="file: expected to read it, found: Is a directory: see what stands"):
        open_bytes(tmp_path)

    def exhausted(*arguments):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(type(tmp_path), "open", exhausted)
    with pytest.raises(DataError, match="found: Too many open files: raise `ulimit -n`"):
        token_file.open_bytes(tmp_path / "p.idx")
