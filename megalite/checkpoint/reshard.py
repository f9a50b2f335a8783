"""Where two pieces of one tensor meet (pure arithmetic on boxes and flat ranges).

A piece is a flat range of a box. In the full tensor such a range is not rectangular: it begins and ends in
the middle of a row. It is, though, a chain of at most 2 * ndim - 1 rectangles, each of which is contiguous
in the range:

    range 3:14 of a [4, 5] box      . . . a a      a: row 0, columns 3:5
                                    b b b b b      b: rows 1:2
                                    c c c c .      c: row 2, columns 0:4

Two rectangles meet in a rectangle, so a few strided copies per pair of pieces take any layout to any other.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from megalite.checkpoint.format import CheckpointError, PieceRow, Region, Shape


class Rectangle(NamedTuple):
    """It begins at `start` and is elements [offset, offset + prod(shape)) of a piece, row-major."""

    start: Shape
    shape: Shape
    offset: int


class Window(NamedTuple):
    """How to see a rectangle in a piece's flat tensor: `flat[start:stop].view(shape)[cut]`."""

    start: int
    stop: int
    shape: Shape
    cut: tuple[slice, ...]


def overlaps(source: Region, target: Region) -> list[tuple[Window, Window]]:
    """Windows of equal content: (in the source, in the target), one pair per rectangle that both hold."""
    if (source.box_start, source.box_shape) == (target.box_start, target.box_shape):
        return _range_overlap(source, target)
    if not _boxes_meet(source, target):
        return []
    pairs = []
    for mine in _rectangles(source):
        for theirs in _rectangles(target):
            low = tuple(map(max, mine.start, theirs.start))
            high = tuple(map(min, _end(mine), _end(theirs)))
            if all(first < last for first, last in zip(low, high, strict=True)):
                pairs.append((_window(mine, low, high), _window(theirs, low, high)))
    return pairs


def _range_overlap(source: Region, target: Region) -> list[tuple[Window, Window]]:
    """The common case: the same box, so only the flat ranges differ."""
    low = max(source.start, target.start)
    high = min(source.start + source.size, target.start + target.size)
    if low >= high:
        return []
    there, here = (
        Window(low - r.start, high - r.start, (high - low,), (slice(None),)) for r in (source, target)
    )
    return [(there, here)]


def _boxes_meet(a: Region, b: Region) -> bool:
    dims = zip(a.box_start, a.box_shape, b.box_start, b.box_shape, strict=True)
    return all(max(s, t) < min(s + m, t + n) for s, m, t, n in dims)


def _rectangles(region: Region) -> Iterator[Rectangle]:
    offset = 0
    for origin, shape in _chain(region.box_shape, region.start, region.start + region.size):
        start = tuple(a + b for a, b in zip(region.box_start, origin, strict=True))
        yield Rectangle(start, shape, offset)
        offset += math.prod(shape)


def _chain(shape: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    """(origin, shape) of the rectangles that make up [start, stop) of a row-major tensor, in flat order."""
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    rest = shape[1:]
    row = math.prod(rest)
    (first, head), (last, tail) = divmod(start, row), divmod(stop, row)
    if first == last:
        yield from _inside_row(rest, first, head, tail)
        return
    if head:
        yield from _inside_row(rest, first, head, row)
        first += 1
    if first < last:
        yield (first, *(0 for _ in rest)), (last - first, *rest)
    yield from _inside_row(rest, last, 0, tail)


def _inside_row(shape: Shape, row: int, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    for origin, size in _chain(shape, start, stop):
        yield (row, *origin), (1, *size)


def _end(rectangle: Rectangle) -> Shape:
    return tuple(a + b for a, b in zip(rectangle.start, rectangle.shape, strict=True))


def _window(whole: Rectangle, low: Shape, high: Shape) -> Window:
    """The part [low, high) of a rectangle. Only the rows that it touches lie between start and stop."""
    if not whole.shape:
        return Window(whole.offset, whole.offset + 1, (), ())
    rest = whole.shape[1:]
    row = math.prod(rest)
    first, last = low[0] - whole.start[0], high[0] - whole.start[0]
    columns = (slice(a - s, b - s) for a, b, s in zip(low[1:], high[1:], whole.start[1:], strict=True))
    return Window(
        whole.offset + first * row, whole.offset + last * row, (last - first, *rest), (slice(None), *columns)
    )


# Coverage


def check_coverage(rows: Iterable[PieceRow]) -> None:
    """Raise CheckpointError unless the pieces hold every element of every (kind, name) exactly once."""
    groups: dict[tuple[str, str], list[PieceRow]] = {}
    for row in rows:
        groups.setdefault((row.kind, row.name), []).append(row)
    for (kind, name), group in groups.items():
        shapes = {row.full_shape for row in group}
        if len(shapes) > 1:
            listed = " and ".join(map(str, sorted(shapes)))
            raise CheckpointError(f"{kind} {name} has more than one full shape: {listed}")
        regions = list(_joined(row.region for row in group))
        _check_exact(regions, math.prod(group[0].full_shape), f"{kind} {name}")


def _joined(regions: Iterable[Region]) -> Iterator[Region]:
    """Adjacent ranges of one box as one: many data-parallel pieces become one per tensor-parallel box."""
    current: Region | None = None
    for region in sorted(regions):
        if current and region[:2] == current[:2] and region.start == current.start + current.size:
            current = current._replace(size=current.size + region.size)
            continue
        if current:
            yield current
        current = region
    if current:
        yield current


def _check_exact(regions: list[Region], num_elements: int, what: str) -> None:
    for i, first in enumerate(regions):
        for second in regions[:i]:
            if overlaps(first, second):
                raise CheckpointError(f"{what}: two pieces hold the same elements, {second} and {first}")
    held = sum(region.size for region in regions)
    if held != num_elements:
        raise CheckpointError(f"{what}: the pieces hold {held} of {num_elements} elements")
