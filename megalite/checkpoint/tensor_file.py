"""Safetensors files, written as a stream, and files that survive a crash.

The safetensors library writes a file from tensors that are all in memory. Here one tensor at a time is taken
from the device, written and hashed in the same pass, so a rank needs host memory for its largest tensor only.
The format is 8 bytes of header length (little-endian), a JSON header, then the tensors' bytes without gaps
(https://github.com/huggingface/safetensors#format). Reading is left to the library.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megalite.checkpoint.format import FileEntry, Shape
from megalite.files import sync

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
    """Write and sync a safetensors file; its size and sha256. Wide dtypes come first: so all lie aligned."""
    widest_first = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    return _write(path, _chunks(widest_first, metadata))


def write_text_file(path: Path, text: str) -> FileEntry:
    """Write and sync a text file; its size and sha256."""
    return _write(path, [text.encode()])


def _write(path: Path, chunks: Iterable[bytes | memoryview]) -> FileEntry:
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
        sync(file)
        return FileEntry(size_bytes=file.tell(), sha256=digest.hexdigest())


def _chunks(entries: list[Entry], metadata: dict[str, str]) -> Iterator[bytes | memoryview]:
    yield _header(entries, metadata)
    for entry in entries:
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
