"""Two checkpoints side by side, tensor by tensor, in whatever layouts they were written.

Equal is bit for bit: a NaN equals itself, and -0.0 is not 0.0, from which it differs by 0. The relative
difference is |a - b| / max(|a|, |b|). Both differences are infinite where one of the numbers is not finite.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from megalite.checkpoint.format import Shape
from megalite.inspection.blocks import Key, Range, model_first, ranges_of

TINY = torch.finfo(torch.float64).tiny


class Tensors(Protocol):
    """What is compared: tensors by (kind, name), of which ranges can be read in float32."""

    @property
    def shapes(self) -> Mapping[Key, Shape]: ...

    def read(self, key: Key, where: Range) -> torch.Tensor: ...


class Place(NamedTuple):
    """The numbers a and b at an index of the full tensor."""

    at: tuple[int, ...]
    a: float
    b: float


@dataclass
class Difference:
    """How one tensor of both differs; nothing has been found when `num_different` is 0.

    num_different: elements that are not the same bits.
    place: of the largest absolute difference, the first of its kind.
    """

    key: Key
    shape: Shape
    num_different: int = 0
    largest_absolute: float = 0.0
    largest_relative: float = 0.0
    place: Place | None = None

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def add(self, a: torch.Tensor, b: torch.Tensor, start: int) -> None:
        """Take in a block of each, float32 [n], whose first element is number `start` of the tensor."""
        bits = a.view(torch.int32), b.view(torch.int32)
        if bits[0].equal(bits[1]):
            return
        places = (bits[0] != bits[1]).nonzero().view(-1)
        x, y = a[places].double(), b[places].double()
        absolute = torch.where(x.isfinite() & y.isfinite(), (x - y).abs_(), math.inf)
        larger = torch.maximum(x.abs(), y.abs()).clamp_(min=TINY)
        relative = torch.where(absolute.isfinite(), absolute / larger, math.inf)
        self.num_different += places.numel()
        self.largest_relative = max(self.largest_relative, float(relative.max()))
        at = int(absolute.argmax())
        if self.place is None or absolute[at] > self.largest_absolute:
            self.largest_absolute = float(absolute[at])
            self.place = Place(_index(start + int(places[at]), self.shape), float(x[at]), float(y[at]))


def _index(number: int, shape: Shape) -> tuple[int, ...]:
    """Where element `number`, in row-major order, lies."""
    index: list[int] = []
    for length in reversed(shape):
        number, place = divmod(number, length)
        index.insert(0, place)
    return tuple(index)


@dataclass(frozen=True)
class Comparison:
    """Two sets of tensors: those that both have in one shape, and the rest.

    other_shapes: tensors that both have, in the shapes of a and b.
    """

    tensors: list[Difference]
    other_shapes: dict[Key, tuple[Shape, Shape]]
    only_in_a: list[Key]
    only_in_b: list[Key]

    @property
    def different(self) -> list[Difference]:
        return [tensor for tensor in self.tensors if tensor.num_different]

    @property
    def is_equal(self) -> bool:
        """Whether both hold the same tensors, bit for bit."""
        return not (self.different or self.other_shapes or self.only_in_a or self.only_in_b)


def compare(a: Tensors, b: Tensors, progress: Callable[[int], object]) -> Comparison:
    """Read both once. Some blocks of each are in memory at a time.

    progress: is told the number of elements that were compared, as they were.
    """
    both = [key for key in model_first(a.shapes) if key in b.shapes]
    same = [key for key in both if a.shapes[key] == b.shapes[key]]
    return Comparison(
        tensors=[_compare_tensor(a, b, key, progress) for key in same],
        other_shapes={key: (a.shapes[key], b.shapes[key]) for key in both if a.shapes[key] != b.shapes[key]},
        only_in_a=[key for key in model_first(a.shapes) if key not in b.shapes],
        only_in_b=[key for key in model_first(b.shapes) if key not in a.shapes],
    )


def _compare_tensor(a: Tensors, b: Tensors, key: Key, progress: Callable[[int], object]) -> Difference:
    found = Difference(key, a.shapes[key])
    for where in ranges_of(found.shape):
        found.add(a.read(key, where), b.read(key, where), where.start)
        progress(where.size)
    return found


# Records


class Change(NamedTuple):
    """A fact that two records do not agree on; ABSENT where one has none."""

    key: str
    a: Any
    b: Any


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


def changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Change]:
    """The facts of nested records that differ, by dotted keys, in the order of a, then b."""
    first, second = dict(_facts(a)), dict(_facts(b))
    pairs = [Change(key, first.get(key, ABSENT), second.get(key, ABSENT)) for key in {**first, **second}]
    return [pair for pair in pairs if pair.a != pair.b or type(pair.a) is not type(pair.b)]


def _facts(record: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Objects, and lists of them, taken apart; other lists are one fact."""
    if isinstance(record, Mapping) and record:
        for name, value in record.items():
            yield from _facts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(record, list) and any(isinstance(value, Mapping) for value in record):
        for number, value in enumerate(record):
            yield from _facts(value, f"{key}[{number}]")
    else:
        yield key, record
