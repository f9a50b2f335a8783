"""Safetensors files, written as a stream, and files that survive a crash.

The safetensors library writes a file from tensors that are all in memory. Here they are taken from the
device in blocks, which are written and hashed in one pass while the next are fetched; so a rank needs host
memory for some blocks, and for two tensors where these are made when their turn comes.
The format is 8 bytes of header length (little-endian), a JSON header, then the tensors' bytes without gaps
(https://github.com/huggingface/safetensors#format). Reading is left to the library.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from itertools import cycle
from pathlib import Path

import torch
from safetensors import safe_open

from megalite.checkpoint.format import FileEntry, Shape
from megalite.checkpoint.stream import BLOCK_BYTES, MAX_BLOCKS, Block, stream
from megalite.files import sync

LET_GO_BYTES = 1 << 28
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
    return _write_hashed(path, _tensor_blocks(entries, metadata))


def write_plain_tensor_file(path: Path, entries: Iterable[Entry], metadata: dict[str, str]) -> None:
    """The same without a checksum."""
    _write(path, _tensor_blocks(entries, metadata))


def write_text_file(path: Path, text: str) -> FileEntry:
    """Write and sync a text file; its size and sha256."""
    return _write_hashed(path, [text.encode()])


def copy_file(source: Path, path: Path) -> FileEntry:
    """Write and sync a copy of a file; its size and the sha256 of what was read."""
    with source.open("rb", buffering=0) as file:
        return _write_hashed(path, _file_blocks(file))


def _write_hashed(path: Path, blocks: Iterable[Block]) -> FileEntry:
    digest = hashlib.sha256()
    size_bytes = _write(path, blocks, digest.update)
    return FileEntry(size_bytes=size_bytes, sha256=digest.hexdigest())


def _write(path: Path, blocks: Iterable[Block], *watch: Callable[[Block], object]) -> int:
    """Write and sync a new file, whose blocks others may watch; its size."""
    with path.open("xb") as file:
        stream(blocks, file.write, *watch)
        sync(file)
        return file.tell()


def _tensor_blocks(entries: Iterable[Entry], metadata: dict[str, str]) -> Iterator[Block]:
    """Wide dtypes come first: so all lie aligned."""
    widest_first = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    yield _header(widest_first, metadata)
    for entry in widest_first:
        tensor = entry.read().detach()
        assert tuple(tensor.shape) == tuple(entry.shape), entry.key
        for part in tensor.reshape(-1).split(BLOCK_BYTES // entry.dtype.itemsize):
            flat = part.cpu().to(entry.dtype).contiguous().as_strided((part.numel(),), (1,))
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


def hash_file(path: Path, *watch: Callable[[Block], object]) -> str:
    """The sha256 of a file, in hex; others may watch its blocks go by."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        stream(_file_blocks(file), digest.update, *watch)
    return digest.hexdigest()


def _file_blocks(file: FileIO) -> Iterator[Block]:
    """What a file holds, in buffers that are filled again once the block is used; no more than it needs."""
    num_bytes = os.fstat(file.fileno()).st_size
    block_bytes = max(1, min(BLOCK_BYTES, num_bytes))
    num_blocks = min(MAX_BLOCKS, num_bytes // block_bytes + 1)
    for buffer in cycle([bytearray(block_bytes) for _ in range(num_blocks)]):
        size_bytes = file.readinto(buffer)
        if not size_bytes:
            return
        yield memoryview(buffer)[:size_bytes]


class TensorFile(Mapping[str, torch.Tensor]):
    """The tensors of a safetensors file by name, mapped: they are read when an element is used.

    What was read counts as memory of the process for as long as it is mapped, so after tensors of
    `LET_GO_BYTES` the file is mapped anew; those in use keep their mapping.

    Attributes:
        metadata: texts by name.

    Raises SafetensorError or OSError when the file is none, or is cut off.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._num_bytes = path, 0
        self._file = safe_open(path, framework="pt")
        self._names = dict.fromkeys(self._file.keys())
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        if self._num_bytes > LET_GO_BYTES:
            self._file, self._num_bytes = safe_open(self._path, framework="pt"), 0
        tensor = self._file.get_tensor(name)
        self._num_bytes += tensor.nbytes
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
