"""Safetensors files, written as a stream, and files that survive a crash.

The safetensors library writes a file from tensors that are all in memory. Here one tensor at a time is taken
from the device, written and hashed in the same pass while the next is fetched, so a rank needs host memory
for its two largest tensors only.
The format is 8 bytes of header length (little-endian), a JSON header, then the tensors' bytes without gaps
(https://github.com/huggingface/safetensors#format). Reading is left to the library.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalite.checkpoint.format import FileEntry, Shape
from megalite.files import sync

Chunk = bytes | memoryview
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Entry:
    """A tensor to be written as `dtype`: `read` gives it, in any dtype, when its turn comes."""

    key: str
    shape: Shape
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensor_file(path: Path, entries: Iterable[Entry], metadata: dict[str, str]) -> FileEntry:
    """Write and sync a safetensors file; its size and sha256."""
    digest = hashlib.sha256()
    return _entry_of(_write(path, _tensor_chunks(entries, metadata), digest.update), digest)


def write_plain_tensor_file(path: Path, entries: Iterable[Entry], metadata: dict[str, str]) -> None:
    """The same without a checksum."""
    _write(path, _tensor_chunks(entries, metadata))


def write_text_file(path: Path, text: str) -> FileEntry:
    """Write and sync a text file; its size and sha256."""
    digest = hashlib.sha256()
    return _entry_of(_write(path, [text.encode()], digest.update), digest)


def _entry_of(size_bytes: int, digest: Any) -> FileEntry:
    return FileEntry(size_bytes=size_bytes, sha256=digest.hexdigest())


def _write(path: Path, chunks: Iterable[Chunk], watch: Callable[[Chunk], object] | None = None) -> int:
    """Write what comes, and while that is written let `watch` have it and fetch the next; the size.

    None of the three holds the interpreter for long.
    """
    source = iter(chunks)
    with path.open("xb") as file, ThreadPoolExecutor(2) as beside:
        coming = beside.submit(next, source, None)
        while (chunk := coming.result()) is not None:
            coming = beside.submit(next, source, None)
            watched = beside.submit(watch, chunk) if watch else None
            file.write(chunk)
            if watched:
                watched.result()
        sync(file)
        return file.tell()


def _tensor_chunks(entries: Iterable[Entry], metadata: dict[str, str]) -> Iterator[Chunk]:
    """Wide dtypes come first: so all lie aligned."""
    widest_first = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    yield _header(widest_first, metadata)
    for entry in widest_first:
        tensor = entry.read().detach().cpu().to(entry.dtype)
        assert tuple(tensor.shape) == tuple(entry.shape), entry.key
        flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))
        yield flat.view(torch.uint8).numpy().data


def _header(entries: list[Entry], metadata: dict[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for entry in entries:
        end = offset + entry.size_bytes
        header[entry.key] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin on a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def hash_file(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
