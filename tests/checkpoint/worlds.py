"""Fake worlds for checkpoint tests: ranks are threads, and a layout is a way to cut tensors by hand."""

import itertools
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalite.checkpoint.format import Piece
from megalite.checkpoint.save import save_checkpoint

Tensors = dict[tuple[str, str], torch.Tensor]  # full tensors by (kind, name)


def alone(value: Any) -> list[Any]:
    """The gather of a world of one rank."""
    return [value]


def run_world(world_size: int, body: Callable[[int, Callable[[Any], list[Any]]], Any]) -> list[Any]:
    """body(rank, gather) in one thread per rank. What each returned, or the error that it raised."""
    values: list[Any] = [None] * world_size
    barrier = threading.Barrier(world_size)

    def gather_on(rank: int) -> Callable[[Any], list[Any]]:
        def gather(value: Any) -> list[Any]:
            values[rank] = value
            barrier.wait(timeout=10)
            everything = list(values)
            barrier.wait(timeout=10)
            return everything

        return gather

    def run(rank: int) -> Any:
        try:
            return body(rank, gather_on(rank))
        except Exception as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))


@dataclass(frozen=True)
class Cut:
    """How one tensor lies on tp x dp ranks; rank = dp_rank * tp_size + tp_rank.

    dim:     cut dimension, None when every tp rank holds all of it (and tp rank 0 owns it).
    columns: borders of the tp parts along `dim`, as fractions of it; ascending, first 0, last 1.
    ranges:  borders of the dp parts along the flat box, likewise.
    """

    dim: int | None
    columns: tuple[float, ...] = (0.0, 1.0)
    ranges: tuple[float, ...] = (0.0, 1.0)


def even_cut(dim: int | None, tp_size: int = 1, dp_size: int = 1) -> Cut:
    return Cut(dim, *(tuple(i / n for i in range(n + 1)) for n in (tp_size, dp_size)))


def cut_tensor(full: torch.Tensor, kind: str, name: str, cut: Cut) -> list[Piece]:
    """The pieces of one tensor, one for each rank, as copies."""
    pieces = []
    tp_parts = list(enumerate(itertools.pairwise(cut.columns)))
    for low, high in itertools.pairwise(cut.ranges):
        for tp_rank, part in tp_parts:
            start, shape = [0] * full.dim(), list(full.shape)
            if cut.dim is not None:
                first, last = (round(border * full.shape[cut.dim]) for border in part)
                start[cut.dim], shape[cut.dim] = first, last - first
            box = full[tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))].reshape(-1)
            begin, end = (round(border * math.prod(shape)) for border in (low, high))
            owned = cut.dim is not None or tp_rank == 0
            flat = box[begin:end].clone()
            pieces.append(
                Piece(name, kind, tuple(full.shape), tuple(start), tuple(shape), begin, flat, owned)
            )
    return pieces


def cut_all(tensors: Tensors, cut_of: Callable[[str, torch.Tensor], Cut]) -> list[list[Piece]]:
    """The pieces of every rank."""
    by_tensor = [cut_tensor(full, kind, name, cut_of(name, full)) for (kind, name), full in tensors.items()]
    return [list(pieces) for pieces in zip(*by_tensor, strict=True)]


def save_world(
    root: Path,
    step: int,
    ranks: list[list[Piece]],
    state: dict[str, Any] | None = None,
    files: dict[str, str] | None = None,
) -> Path:
    """Save from as many ranks as there are lists of pieces; raises what they raised."""
    results = run_world(
        len(ranks),
        lambda rank, gather: save_checkpoint(
            root,
            step,
            ranks[rank],
            state or {"step": step},
            files or {},
            rank=rank,
            world_size=len(ranks),
            gather=gather,
        ),
    )
    errors = [result for result in results if isinstance(result, Exception)]
    if errors:
        assert len({str(error) for error in errors}) == 1 and len(errors) == len(ranks), errors
        raise errors[0]
    return results[0]


def blank(pieces: list[Piece]) -> list[Piece]:
    """The same pieces over tensors full of NaN, to be loaded into."""
    return [
        Piece(
            p.name,
            p.kind,
            p.full_shape,
            p.box_start,
            p.box_shape,
            p.flat_start,
            torch.full_like(p.tensor, torch.nan, dtype=torch.float32).to(p.tensor.dtype),
            p.owned,
        )
        for p in pieces
    ]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the last bit, NaN included."""
    return a.shape == b.shape and a.view(torch.int32).equal(b.view(torch.int32))
