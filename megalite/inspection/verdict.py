"""What a comparison found, as facts and in words."""

from collections.abc import Iterator, Sequence
from itertools import chain

from megalite.inspection.blocks import kinds_of
from megalite.inspection.comparison import ABSENT, Change, Comparison, Difference
from megalite.inspection.table import Facts, aligned

MOST_LINES = 10  # of each list, unless all are asked for
DIFFERENCES = ["kind", "name", "shape", "different elements", "largest |a-b|", "relative", "at", "a", "b"]


def facts_of_comparison(a: str, b: str, found: Comparison, records: dict[str, list[Change]]) -> Facts:
    """JSON-able. a, b: names of the two; records: what their files say differently, by file."""
    return {
        "a": a,
        "b": b,
        "equal": found.is_equal,
        "tensors": [_facts_of_difference(tensor) for tensor in found.tensors],
        "other_shapes": [
            {"kind": kind, "name": name, "a": list(shapes[0]), "b": list(shapes[1])}
            for (kind, name), shapes in found.other_shapes.items()
        ],
        "only_in_a": [{"kind": kind, "name": name} for kind, name in found.only_in_a],
        "only_in_b": [{"kind": kind, "name": name} for kind, name in found.only_in_b],
        "records": {file: [_facts_of_change(change) for change in lines] for file, lines in records.items()},
    }


def _facts_of_difference(found: Difference) -> Facts:
    kind, name = found.key
    return {
        "kind": kind,
        "name": name,
        "shape": list(found.shape),
        "num_elements": found.num_elements,
        "num_different": found.num_different,
        "largest_absolute_difference": found.largest_absolute,
        "largest_relative_difference": found.largest_relative,
        "place": found.place and found.place._asdict(),
    }


def _facts_of_change(change: Change) -> Facts:
    """A value that one of them has not is left out."""
    sides = {"a": change.a, "b": change.b}
    return {"key": change.key, **{side: value for side, value in sides.items() if value is not ABSENT}}


def comparison_in_words(
    a: str, b: str, found: Comparison, records: dict[str, list[Change]], *, all_lines: bool
) -> Iterator[str]:
    """The two, a row for each kind, what differs, and the verdict."""
    yield f"a  {a}"
    yield f"b  {b}"
    yield ""
    yield from aligned(list(_kinds(found)), "lrrrrrrr")
    most = None if all_lines else MOST_LINES
    if found.different:
        yield ""
        yield from aligned([DIFFERENCES, *map(_difference, found.different[:most])], "lllrrrlrr")
        yield from _rest(found.different, most)
    lists = {
        "other shapes": [
            f"{kind} {name}: {list(here)} and {list(there)}"
            for (kind, name), (here, there) in found.other_shapes.items()
        ],
        "only in a": [" ".join(key) for key in found.only_in_a],
        "only in b": [" ".join(key) for key in found.only_in_b],
        **{
            file: [f"{key}: {here} and {there}" for key, here, there in lines]
            for file, lines in records.items()
        },
    }
    for title, lines in lists.items():
        if lines:
            yield ""
            yield f"{title}:"
            yield from (f"  {line}" for line in lines[:most])
            yield from _rest(lines, most)
    yield ""
    yield verdict(found)


def _rest(lines: Sequence[object], most: int | None) -> Iterator[str]:
    """How many lines were left out, if any."""
    if most is not None and len(lines) > most:
        yield f"  and {len(lines) - most:,} more; --tensors shows all"


def verdict(found: Comparison) -> str:
    """One line."""
    if found.is_equal:
        num_elements = sum(tensor.num_elements for tensor in found.tensors)
        return f"equal bit for bit: {len(found.tensors):,} tensors, {num_elements:,} elements"
    counts = {
        "with other numbers": len(found.different),
        "with another shape": len(found.other_shapes),
        "only in a": len(found.only_in_a),
        "only in b": len(found.only_in_b),
        "equal": len(found.tensors) - len(found.different),
    }
    return "different: of the tensors " + ", ".join(f"{n:,} {what}" for what, n in counts.items() if n)


def _kinds(found: Comparison) -> Iterator[list[str]]:
    """A row for each."""
    others = [list(found.other_shapes), found.only_in_a, found.only_in_b]
    yield ["kind", "equal", "differ", "other shape", "only in a", "only in b", "largest |a-b|", "relative"]
    for kind in kinds_of(chain([tensor.key for tensor in found.tensors], *others)):
        tensors = [tensor for tensor in found.tensors if tensor.key[0] == kind]
        num_different = sum(tensor.num_different > 0 for tensor in tensors)
        counts = [len(tensors) - num_different, num_different]
        counts += [sum(key[0] == kind for key in keys) for keys in others]
        absolute = max((tensor.largest_absolute for tensor in tensors), default=0.0)
        relative = max((tensor.largest_relative for tensor in tensors), default=0.0)
        yield [kind, *(f"{count:,}" for count in counts), f"{absolute:.3g}", f"{relative:.3g}"]


def _difference(tensor: Difference) -> list[str]:
    """Cells under DIFFERENCES."""
    assert tensor.place is not None, "only those that differ are told"
    at, a, b = tensor.place
    differences = [f"{tensor.largest_absolute:.3g}", f"{tensor.largest_relative:.3g}"]
    elements = f"{tensor.num_different:,} of {tensor.num_elements:,}"
    return [
        *tensor.key,
        str(list(tensor.shape)),
        elements,
        *differences,
        str(list(at)),
        f"{a:.9g}",
        f"{b:.9g}",
    ]
