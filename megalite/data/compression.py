"""Files that may be compressed, read as if they were not."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megalite.data.error import DataError

CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}


def plain_suffix(path: Path) -> str:
    """Kind of the content: `.jsonl` of both a.jsonl and a.jsonl.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in CODECS), "")


def is_compressed(path: Path) -> bool:
    """Whether the name says so."""
    return path.suffix.lower() in CODECS


@contextmanager
def decompressed(raw: BinaryIO, path: Path) -> Iterator[BinaryIO]:
    """The content of the open file at `path`, in small pieces; `raw` itself when its name names no codec.

    Several frames in one file are read to the end. Raises DataError for damaged or truncated compressed data.
    """
    if not is_compressed(path):
        yield raw
        return
    import pyarrow  # half a second, and seldom needed

    codec = CODECS[path.suffix.lower()]
    stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), codec)
    try:
        yield io.BufferedReader(stream, 1 << 18)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: {codec} data: expected it whole, found: {reason}: copy it again") from error
