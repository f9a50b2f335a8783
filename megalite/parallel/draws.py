"""Random numbers that depend on a key and their place in a tensor alone: any part can be drawn by itself.

A counter-based generator (Philox, Salmon 2011, doi 10.1145/2063384.2063405) gives the n-th number of a stream
without those before it. Each TILE columns of a matrix are a stream of their own, row by row: a part along
rows is a run of each stream, and one along columns is some of the streams.
"""

import hashlib
from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
import torch

TILE = 64  # columns: a part along columns draws at most so many less one too many at either end
NUMBERS_PER_COUNT = 8  # Philox 4x64 gives 256 bits per count
CHUNK = 1 << 14  # numbers at a time: within a core's cache, and below what torch cuts over threads

Box = tuple[slice, ...]
Transform = Callable[[torch.Tensor], torch.Tensor]


def key_of(seed: int, name: str) -> int:
    """128 bits of a seed and a name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")


def draw_box(key: int, full_shape: tuple[int, ...], box: Box, transform: Transform) -> torch.Tensor:
    """Part of a tensor [.., rows, columns] that is never whole; fp32.

    box: the part, with both ends of each slice. transform: applied in place to float64 uniform on (-1, 1).
    A vector is one row.
    """
    *leading, rows, _ = (1, *full_shape) if len(full_shape) == 1 else full_shape
    *outer, of_rows, of_columns = (slice(0, 1), *box) if len(box) == 1 else box
    part = torch.from_numpy(np.empty([each.stop - each.start for each in box], dtype=np.float32))
    if 0 in part.shape:
        return part
    flat = part.view(-1, of_rows.stop - of_rows.start, of_columns.stop - of_columns.start)
    places = product(*(range(each.start, each.stop) for each in outer))
    for place, matrix in zip(places, flat, strict=True):
        above = _index(place, leading) * rows
        _draw_matrix(key, slice(above + of_rows.start, above + of_rows.stop), of_columns, transform, matrix)
    return part


def _draw_matrix(key: int, rows: slice, columns: slice, transform: Transform, into: torch.Tensor) -> None:
    for tile in range(columns.start // TILE, (columns.stop - 1) // TILE + 1):
        first = max(columns.start, tile * TILE)
        last = min(columns.stop, (tile + 1) * TILE)
        there = slice(first - columns.start, last - columns.start)
        row = 0
        for numbers in _stream(key, tile, rows, transform):
            into[row : row + len(numbers), there] = numbers[:, first - tile * TILE : last - tile * TILE]
            row += len(numbers)


def _stream(key: int, tile: int, rows: slice, transform: Transform) -> Iterator[torch.Tensor]:
    """The numbers of some rows of a tile [.., TILE], float64, a chunk of rows at a time."""
    counts_per_row = TILE // NUMBERS_PER_COUNT
    bits = np.random.Philox(key=key, counter=[rows.start * counts_per_row, tile, 0, 0])
    for start in range(rows.start, rows.stop, CHUNK // TILE):
        num_numbers = TILE * min(CHUNK // TILE, rows.stop - start)
        drawn = torch.from_numpy(bits.random_raw(num_numbers // 2).view(np.int32).astype(np.float64))
        yield transform(drawn.add_(0.5).mul_(2.0**-31)).view(-1, TILE)  # neither end, and symmetric


def _index(place: tuple[int, ...], shape: list[int]) -> int:
    index = 0
    for at, size in zip(place, shape, strict=True):
        index = index * size + at
    return index
