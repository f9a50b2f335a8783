"""Pickles of torch and of Megatron, read without running anything that they name.

What a pickle names beyond tensors and plain values is replaced by an empty object when it is known to be
harmless (an enum or a config in the arguments, a state of a random generator), and refused when it is not.
"""

import argparse
import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from megalite.checkpoint.format import CheckpointError

HARMLESS = (
    "megatron.",
    "numpy.",
    "transformer_engine.",
    "torch.distributed.checkpoint.",
    "torch.serialization._get_layout",
    "pathlib.PosixPath",
    "signal.Signals",
    "types.SimpleNamespace",
    "io.BytesIO",
    "_io.BytesIO",
)
READ = {
    f"{kind.__module__}.{kind.__name__}": kind
    for kind in (Metadata, MetadataIndex, TensorStorageMetadata, ChunkStorageMetadata, _StorageInfo)
} | {"torch.Size": torch.Size}
DAMAGE = (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, pickle.UnpicklingError)


class Inert:
    """Stands for anything that a pickle wants to have made, and does nothing."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> "Inert":
        return super().__new__(cls)

    def __setstate__(self, _state: Any) -> None:
        pass


def load_torch_file(file: Path) -> Any:
    """What torch.save wrote into a file; its tensors are mapped, and read when an element is used.

    Raises CheckpointError when it is damaged, or names anything that could be code.
    """
    with _harmless(file, file):
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)


def load_torch_bytes(data: bytes, file: Path) -> Any:
    """What torch.save wrote, all of it these bytes of a file. Raises CheckpointError likewise."""
    with _harmless(io.BytesIO(data), file):
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


@contextmanager
def _harmless(source: Path | IO[bytes], file: Path) -> Iterator[None]:
    """Let torch.load pass over what is harmless in it; errors are told of `file`."""
    try:
        names = get_unsafe_globals_in_checkpoint(source)
        _refuse_code(file, [name for name in names if name != "argparse.Namespace"])
        stand_ins = [(Inert, name) for name in names if name != "argparse.Namespace"]
        with safe_globals([argparse.Namespace, *stand_ins]):
            yield
    except CheckpointError:
        raise
    except DAMAGE as error:
        raise damaged(file, error) from None


def load_metadata(file: Path) -> Metadata:
    """The index of a distributed checkpoint, which is a bare pickle. Raises CheckpointError likewise."""
    try:
        with file.open("rb") as opened:
            metadata = _Reader(opened, file).load()
    except CheckpointError:
        raise
    except (*DAMAGE, TypeError, IndexError) as error:
        raise damaged(file, error) from None
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{file} is no index of a distributed checkpoint")
    return metadata


def damaged(file: Path, error: Exception) -> CheckpointError:
    """The line to tell."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return CheckpointError(f"{file} cannot be read: {reason}: get it again")


class _Reader(pickle.Unpickler):
    def __init__(self, opened: Any, file: Path) -> None:
        super().__init__(opened)
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name not in READ and not (
            module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)
        ):
            _refuse_code(self._file, [full_name])
        return READ.get(full_name, Inert)


def _refuse_code(file: Path, names: list[str]) -> None:
    for name in sorted(names):
        if not name.startswith(HARMLESS):
            raise CheckpointError(f"{file} would run {name}: it is refused, and nothing of it was run")
