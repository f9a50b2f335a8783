"""A checkpoint's tensors as flat blocks: whoever reads them holds some blocks, however large a tensor is."""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from megalite.checkpoint.format import Piece, Shape
from megalite.checkpoint.load import TensorReader

BLOCK_ELEMENTS = 1 << 21
KEPT_BYTES = 1 << 26  # of mapped files, before they are let go

MODEL_KINDS = ("weight", "buffer")

Key = tuple[str, str]  # kind and name of a tensor


def model_first(keys: Iterable[Key]) -> list[Key]:
    """Weights, then buffers, then what an optimizer keeps, by its kinds; within a kind in the order given."""

    def rank(key: Key) -> tuple[int, str]:
        kind, _ = key
        return (MODEL_KINDS.index(kind) if kind in MODEL_KINDS else len(MODEL_KINDS)), kind

    return sorted(keys, key=rank)


def kinds_of(keys: Iterable[Key]) -> list[str]:
    """Their kinds, in that order."""
    return list(dict.fromkeys(kind for kind, _ in model_first(keys)))


class Range(NamedTuple):
    """Elements [start, start + size) of a tensor, counted in row-major order."""

    start: int
    size: int


def ranges_of(shape: Shape) -> Iterator[Range]:
    """The blocks of a tensor, in order."""
    num_elements = math.prod(shape)
    for start in range(0, num_elements, BLOCK_ELEMENTS):
        yield Range(start, min(BLOCK_ELEMENTS, num_elements - start))


class BlockReader:
    """Reads ranges of a checkpoint's tensors, whatever layout wrote it.

    shapes: the full shape of each tensor, by (kind, name).
    """

    def __init__(self, reader: TensorReader) -> None:
        self.shapes = reader.shapes
        self._reader, self._num_bytes = reader, 0

    def read(self, key: Key, where: Range) -> torch.Tensor:
        """float32 [size], a copy. Raises CheckpointError when the checkpoint does not hold all of it."""
        kind, name = key
        shape, flat = self.shapes[key], torch.empty(where.size)
        self._reader.fill([Piece(name, kind, shape, (0,) * len(shape), shape, where.start, flat)])
        self._num_bytes += flat.nbytes
        if self._num_bytes > KEPT_BYTES:
            self._reader.let_go()
            self._num_bytes = 0
        return flat
