import os

import numpy as np
import pytest

from megalite.data.indexed_dataset import IndexedDataset
from megalite.data.indexed_writer import UINT16, IndexedDatasetWriter


@pytest.fixture
def write_dataset(tmp_path):
    """write_dataset([[1, 2], []], name) writes one-sequence documents and opens them."""

    def write(documents, name="data", dtype=UINT16):
        with IndexedDatasetWriter(tmp_path / name, dtype) as writer:
            for document in documents:
                writer.add_document([np.array(document, np.int64)])
        return IndexedDataset(tmp_path / name)

    return write


@pytest.fixture
def golden(write_dataset):
    """The golden data: three documents, each closed by id 0."""
    return write_dataset([[1, 2, 3, 0], [4, 5, 0], [6, 0]])


@pytest.fixture
def synced(monkeypatch):
    """The numbers of the files and folders that were synced so far."""
    numbers, fsync = set(), os.fsync

    def recorded(descriptor):
        numbers.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    return numbers
