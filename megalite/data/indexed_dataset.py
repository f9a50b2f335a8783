"""Megatron token files, read: a prefix P stands for P.bin, token ids back to back, and P.idx, their index.

P.idx, little endian, with S sequences and D document boundaries (documents + 1):

    offset        bytes  field
    0             9      magic "MMIDIDX" and two zero bytes
    9             8      u64 version = 1
    17            1      u8 dtype code of the ids in P.bin
    18            8      u64 S
    26            8      u64 D
    34            4 S    i32 length of each sequence, in tokens
    34 +  4 S     8 S    i64 byte offset of each sequence in P.bin
    34 + 12 S     8 D    i64 document boundaries, as sequence numbers: from 0 to S, never falling

A document owns the sequences between two boundaries: usually one, several when its text was cut into
sentences, none when it was empty. Samples and splits count sequences.
"""

import hashlib
import struct
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megalite.data.error import DataError
from megalite.data.token_file import open_bytes, open_tokens

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {
    code: np.dtype(name) for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()
}
FINGERPRINT_IDS = 1 << 14  # at either end of a file
_ROWS_AT_ONCE = 1 << 22  # rows of an index that are checked in one go, so that memory stays flat


def bin_path(prefix: str | Path) -> Path:
    """The file of token ids that belongs to a prefix."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The index file that belongs to a prefix."""
    return Path(f"{prefix}.idx")


class IndexedDataset:
    """The sequences of one prefix, memory-mapped; `dataset[i]` is a view of sequence i, in the file's dtype.

    Views keep the mapping alive, also when the dataset object is gone; they are copies where the file system
    refuses maps. Opening checks the whole index and the sizes of both files against it, so a dataset that
    opens is complete.

    Raises DataError when a file is missing, truncated, extended or inconsistent.

    Attributes: prefix; dtype (of the ids); sequence_lengths [S] i32, in tokens; sequence_pointers [S] i64, in
    bytes; document_indices [D] i64, in sequences; tokens [num_tokens], all ids.
    """

    def __init__(self, prefix: str | Path) -> None:
        text = str(prefix)
        self.prefix = text[:-4] if text.endswith((".bin", ".idx")) else text
        self._index = index = open_bytes(idx_path(self.prefix))
        self.dtype, num_sequences, num_boundaries = _read_header(idx_path(self.prefix), index)
        ends = np.cumsum([HEADER.size, 4 * num_sequences, 8 * num_sequences, 8 * num_boundaries])
        self.sequence_lengths = index[ends[0] : ends[1]].view("<i4")
        self.sequence_pointers = index[ends[1] : ends[2]].view("<i8")
        self.document_indices = index[ends[2] : ends[3]].view("<i8")
        num_bytes = self._check_sequences()
        self._check_documents()
        self.tokens = open_tokens(bin_path(self.prefix), self.dtype, num_bytes)

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    @property
    def num_documents(self) -> int:
        """Documents, empty ones included."""
        return len(self.document_indices) - 1

    @property
    def num_tokens(self) -> int:
        """Token ids in P.bin."""
        return len(self.tokens)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.get(index)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """A view of `length` tokens of sequence `index` from token `offset` on (default: to its end).

        Raises IndexError when there is no such sequence or it does not hold that many tokens.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.prefix}: sequence {index} of {len(self)}")
        size = int(self.sequence_lengths[index])
        length = size - offset if length is None else length
        if not 0 <= offset <= offset + length <= size:
            raise IndexError(f"{self.prefix}: {length} tokens from {offset} of sequence {index} with {size}")
        start = int(self.sequence_pointers[index]) // self.dtype.itemsize + offset
        return self.tokens[start : start + length]

    def document(self, index: int) -> np.ndarray:
        """A view of all tokens of document `index`, its sequences joined."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"{self.prefix}: document {index} of {self.num_documents}")
        first, last = self.document_indices[index : index + 2]
        return self.tokens[self._token_offset(int(first)) : self._token_offset(int(last))]

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What tells this data apart from other data: the sizes of both files and the index's SHA-256."""
        digest = hashlib.sha256(self._index.data).hexdigest()
        return {"bin_bytes": self.tokens.nbytes, "idx_bytes": len(self._index), "idx_sha256": digest}

    @cached_property
    def ids_sha256(self) -> str:
        """Of the first and the last ids: files with sequences of the same lengths seldom share them."""
        ends = (self.tokens[:FINGERPRINT_IDS], self.tokens[-FINGERPRINT_IDS:])
        return hashlib.sha256(b"".join(np.asarray(ids).tobytes() for ids in ends)).hexdigest()

    def _token_offset(self, sequence: int) -> int:
        """Number of tokens before a sequence; `sequence` = S is the end."""
        if sequence == len(self):
            return self.num_tokens
        return int(self.sequence_pointers[sequence]) // self.dtype.itemsize

    def _check_sequences(self) -> int:
        """Lengths are at least 0, pointers are their running sum; returns the bytes that P.bin must have."""
        path, total = idx_path(self.prefix), 0
        for start, lengths in _blocks(self.sequence_lengths):
            if lengths.min() < 0:
                row = int(np.argmax(lengths < 0))
                raise _mismatch(path, f"length of sequence {start + row}", "at least 0", int(lengths[row]))
            sums = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize + total
            expected = np.concatenate([[total], sums[:-1]])
            found = self.sequence_pointers[start : start + len(lengths)]
            if (found != expected).any():
                row = int(np.argmax(found != expected))
                field = f"byte offset of sequence {start + row}"
                raise _mismatch(path, field, int(expected[row]), int(found[row]))
            total = int(sums[-1])
        return total

    def _check_documents(self) -> None:
        """Document boundaries run from 0 to S and never fall."""
        path, boundaries = idx_path(self.prefix), self.document_indices
        for field, row, expected in (("first", 0, 0), ("last", -1, len(self))):
            if boundaries[row] != expected:
                raise _mismatch(path, f"{field} document boundary", expected, int(boundaries[row]))
        for start, _ in _blocks(boundaries):
            block = boundaries[start : start + _ROWS_AT_ONCE + 1]
            falls = np.diff(block) < 0
            if falls.any():
                row = int(np.argmax(falls)) + 1
                field = f"document boundary {start + row}"
                raise _mismatch(path, field, f"at least {block[row - 1]}", int(block[row]))


def _blocks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(array), _ROWS_AT_ONCE):
        yield start, array[start : start + _ROWS_AT_ONCE]


def _mismatch(path: Path, field: str, expected: object, found: object) -> DataError:
    return DataError(
        f"{path}: {field}: expected {expected}, found {found}: the file is damaged, write it again"
    )


def _read_header(path: Path, index: np.ndarray) -> tuple[np.dtype, int, int]:
    """Check the first 34 bytes and the file size; returns dtype, S, D."""
    if len(index) < HEADER.size:
        raise _mismatch(path, "file size", f"at least {HEADER.size} bytes", f"{len(index)} bytes")
    magic, version, code, num_sequences, num_boundaries = HEADER.unpack(index[: HEADER.size].tobytes())
    if magic != MAGIC:
        raise DataError(f"{path}: magic: expected {MAGIC!r}, found {magic!r}: not a Megatron index")
    if version != VERSION:
        raise DataError(
            f"{path}: version: expected {VERSION}, found {version}: not an index that megalite reads"
        )
    if code not in DTYPES:
        known = ", ".join(f"{known} {dtype}" for known, dtype in DTYPES.items())
        raise DataError(
            f"{path}: dtype code: expected one of {known}, found {code}: token ids must be integers"
        )
    size = HEADER.size + 12 * num_sequences + 8 * num_boundaries
    if num_sequences and len(index) == size + num_sequences:
        found = f"{num_sequences} more: the modes of a multimodal file"
        raise DataError(f"{path}: file size: expected {size} bytes, found {found}: megalite reads text only")
    if num_boundaries < 1:
        raise _mismatch(path, "number of document boundaries", "at least 1", num_boundaries)
    if len(index) != size:
        counts = f"{num_sequences} sequences and {num_boundaries} document boundaries"
        raise _mismatch(path, "file size", f"{size} bytes ({counts})", f"{len(index)} bytes")
    return DTYPES[code], num_sequences, num_boundaries
