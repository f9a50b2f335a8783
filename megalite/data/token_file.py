"""A file's bytes as an array: mapped, or read where the file system refuses maps, with the same values."""

import errno
import mmap
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megalite.data.error import DataError


class TokenFile:
    """Ids of a file that cannot be mapped: `ids[begin:end]` reads them into an array of its own.

    There is no position to share, so threads and forked workers may read at once.
    """

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.dtype = dtype
        self._file = _open(path)
        self.nbytes = os.fstat(self._file.fileno()).st_size

    def __len__(self) -> int:
        return self.nbytes // self.dtype.itemsize

    def __getitem__(self, part: slice) -> np.ndarray:
        begin, end, step = part.indices(len(self))
        size = self.dtype.itemsize
        data = _read(self._file, max(0, end - begin) * size, begin * size)
        return np.frombuffer(data, self.dtype)[::step]


def open_bytes(path: Path) -> np.ndarray:
    """The whole file as u8 [bytes], read-only: a map that lives as long as any view of it, or else a copy.

    Raises DataError when the file cannot be opened or read.
    """
    with _open(path) as file:
        try:
            return _map(file)
        except OSError:
            return np.frombuffer(_read(file, os.fstat(file.fileno()).st_size, 0), np.uint8)


def open_tokens(path: Path, dtype: np.dtype, num_bytes: int) -> np.ndarray | TokenFile:
    """The ids of a file of `num_bytes`, none of which is read yet.

    Raises DataError when the file cannot be opened or has another size.
    """
    with _open(path) as file:
        found = os.fstat(file.fileno()).st_size
        if found != num_bytes:
            what = "truncated" if found < num_bytes else "extended"
            expected = f"{num_bytes} bytes ({num_bytes // dtype.itemsize} tokens of {dtype} in the index)"
            raise DataError(f"{path}: file size: expected {expected}, found {found}: {what}, write it again")
        try:
            return _map(file).view(dtype)
        except OSError:
            return TokenFile(path, dtype)


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError:
        prefix = path.with_suffix("")
        hint = f"is {prefix} the prefix of a .bin/.idx pair made by tools/preprocess_data.py?"
        raise DataError(f"{path}: file: expected it to exist, found nothing: {hint}") from None
    except OSError as error:
        remedy = (
            "raise `ulimit -n`" if error.errno == errno.EMFILE else "see what stands there and who owns it"
        )
        raise DataError(f"{path}: file: expected to read it, found: {error.strerror}: {remedy}") from None


def _map(file: BinaryIO) -> np.ndarray:
    """The file as u8 [bytes]; an empty one has nothing to map. Raises OSError where maps are refused."""
    if os.fstat(file.fileno()).st_size == 0:
        return np.empty(0, np.uint8)
    return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _read(file: BinaryIO, num_bytes: int, offset: int) -> bytes:
    """Exactly `num_bytes` from `offset` on: one read may give less than it was asked for."""
    parts = []
    while num_bytes:
        part = os.pread(file.fileno(), num_bytes, offset)
        if not part:
            raise DataError(
                f"{file.name}: expected {num_bytes} bytes more at byte {offset}, found its end: was it cut?"
            )
        parts.append(part)
        offset, num_bytes = offset + len(part), num_bytes - len(part)
    return b"".join(parts)
