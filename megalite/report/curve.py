"""The numbers of a run as points of a curve, few enough to be drawn (pure arithmetic)."""

from collections.abc import Iterable, Mapping, Sequence
from math import ceil
from statistics import fmean
from typing import Any, NamedTuple

MOST_POINTS = 600  # of a curve: more than a page is wide


class Point(NamedTuple):
    """The mean of a number over neighbouring steps, and how far it went; `step` is the last of these."""

    step: int
    mean: float
    least: float
    largest: float


def points_of(rows: Sequence[Mapping[str, Any]], name: str, most: int = MOST_POINTS) -> list[Point]:
    """A number of metrics.jsonl over the steps that have it; each step is a point of its own if `most` allow.

    rows: in the order of their steps. A step whose number is none (null) has no point.
    """
    return thinned([(row["step"], row[name]) for row in rows if row.get(name) is not None], most)


def thinned(values: Sequence[tuple[int, float]], most: int) -> list[Point]:
    """Points over equally many neighbours each, but the last."""
    size = max(1, ceil(len(values) / most))
    return [_point(values[first : first + size]) for first in range(0, len(values), size)]


def _point(values: Sequence[tuple[int, float]]) -> Point:
    numbers = [value for _, value in values]
    mean = numbers[0] if len(numbers) == 1 else fmean(numbers)  # exact where there is nothing to average
    return Point(values[-1][0], mean, min(numbers), max(numbers))


def last(rows: Iterable[Mapping[str, Any]], name: str) -> tuple[int, float] | None:
    """The last step that has a number, and the number."""
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return found[-1] if found else None
