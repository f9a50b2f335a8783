"""Token files to measure with."""

from pathlib import Path

import numpy as np

from megalite.data.indexed_dataset import HEADER, MAGIC, VERSION, bin_path, idx_path
from megalite.data.indexed_writer import IndexedDatasetWriter


def random_lengths(num_documents: int, longest_tokens: int = 2000) -> np.ndarray:
    """Lengths of documents from 50 tokens on, i32."""
    return np.random.default_rng(0).integers(50, longest_tokens + 1, num_documents).astype(np.int32)


def write_sparse(prefix: Path, lengths: np.ndarray) -> None:
    """A pair of u16 zeros: as large as the lengths say, without the space on disk."""
    ends = np.cumsum(lengths, dtype=np.int64) * 2
    header = HEADER.pack(MAGIC, VERSION, 8, len(lengths), len(lengths) + 1)
    boundaries = np.arange(len(lengths) + 1, dtype=np.int64)
    rows = [lengths.astype("<i4"), (ends - 2 * lengths).astype("<i8"), boundaries.astype("<i8")]
    idx_path(prefix).write_bytes(header + b"".join(row.tobytes() for row in rows))
    with bin_path(prefix).open("wb") as file:
        file.truncate(int(ends[-1]))


def write_random(prefix: Path, lengths: np.ndarray) -> None:
    """A pair of random ids below 32,000."""
    random = np.random.default_rng(1)
    with IndexedDatasetWriter(prefix) as writer:
        for part in np.array_split(lengths, 16):
            writer.add_documents(random.integers(0, 32_000, part.sum(), dtype=np.uint16), part)
