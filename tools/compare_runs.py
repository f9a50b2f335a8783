"""Say whether two runs recorded the same numbers, step by step, and where they first differ."""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megalite.error import UserError, run_command
from megalite.measure.metrics import METRICS_FILE

EPILOG = """\
Compared is every number of metrics.jsonl that both runs recorded, but for the speed: loss, grad_norm,
validation_loss, learning_rate and the like. A relative difference is |a - b| / max(|a|, |b|). Two NaN are
equal. The exit status is 0 when the runs are equal, or within --tolerance, 1 when not, and 2 when they
cannot be compared.

examples:
  python tools/compare_runs.py runs/before runs/after
  python tools/compare_runs.py runs/one_gpu runs/eight_gpus --tolerance 1e-4
"""
TIMED = frozenset({"step_seconds", "tokens_per_second", "mfu", "save_stall_seconds"})
STEP = "step"

Row = dict[str, float]
Rows = dict[int, Row]


class CompareError(UserError):
    """The two runs cannot be compared."""


class Difference(NamedTuple):
    """One number in both runs; None where a run has recorded none at this step."""

    step: int
    field: str
    a: float | None
    b: float | None

    @property
    def is_equal(self) -> bool:
        """Whether both are the same number, or both NaN."""
        if self.a is None or self.b is None:
            return self.a is self.b
        return self.a == self.b or (math.isnan(self.a) and math.isnan(self.b))

    @property
    def relative(self) -> float:
        """|a - b| / max(|a|, |b|), a ratio; infinite where only one is a finite number."""
        if self.is_equal:
            return 0.0
        if self.a is None or self.b is None or not (math.isfinite(self.a) and math.isfinite(self.b)):
            return math.inf
        larger = max(abs(self.a), abs(self.b))
        return abs(self.a / larger - self.b / larger)  # the difference itself may overflow


class Comparison(NamedTuple):
    """Two runs side by side: each number of each step, and the fields that only one run has."""

    numbers: list[Difference]
    only_in_one: list[str]
    tolerance: float

    @property
    def num_steps(self) -> int:
        return len({number.step for number in self.numbers})

    @property
    def is_bit_equal(self) -> bool:
        return all(number.is_equal for number in self.numbers)

    @property
    def is_close(self) -> bool:
        return all(number.relative <= self.tolerance for number in self.numbers)

    @property
    def first(self) -> Difference | None:
        """The first difference beyond the tolerance; if there is none, the first at all."""
        beyond = (number for number in self.numbers if number.relative > self.tolerance)
        return next(beyond, next((number for number in self.numbers if not number.is_equal), None))

    def largest(self) -> dict[str, Difference]:
        """For each field the number that differs most, the first of its kind."""
        largest: dict[str, Difference] = {}
        for number in self.numbers:
            if number.field not in largest or number.relative > largest[number.field].relative:
                largest[number.field] = number
        return largest


def read_rows(run_dir: Path) -> Rows:
    """step -> the numbers of that step but the timed ones. CompareError when there are none, or a bad row."""
    path = run_dir / METRICS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CompareError(f"cannot read {path}: {reason}: give the folder that a run wrote") from None
    rows: Rows = {}
    for number, line in enumerate(lines, start=1):
        step, row = _parse(f"{path}, line {number}", line)
        if step in rows:
            raise CompareError(f"{path}, line {number}: step {step} a second time: remove one of the rows")
        rows[step] = row
    if not rows:
        raise CompareError(f"{path} is empty: the run has not taken a step yet")
    return rows


def _parse(where: str, line: str) -> tuple[int, Row]:
    try:
        row = json.loads(line)
    except ValueError:
        raise CompareError(f"{where}: not JSON: remove the line, or compare another run") from None
    if not isinstance(row, dict) or type(row.get(STEP)) is not int:
        raise CompareError(f"{where}: expected an object with a whole number 'step': not a row of metrics")
    numbers = {name: value for name, value in row.items() if type(value) in (int, float)}
    return row[STEP], {name: value for name, value in numbers.items() if name not in TIMED | {STEP}}


def compare(a: Rows, b: Rows, tolerance: float = 0.0) -> Comparison:
    """Each field that both runs have, at each step. CompareError unless both have the same steps."""
    _check_steps(a, b)
    fields_a, fields_b = _fields(a), _fields(b)
    shared = [name for name in fields_a if name in fields_b]
    if not shared:
        raise CompareError(
            f"no number in common: {', '.join(fields_a) or 'none'} in the first run, "
            f"{', '.join(fields_b) or 'none'} in the second: compare two runs of megalite"
        )
    numbers = [Difference(step, name, a[step].get(name), b[step].get(name)) for step in a for name in shared]
    numbers = [number for number in numbers if (number.a, number.b) != (None, None)]
    only_in_one = [name for name in [*fields_a, *fields_b] if name not in shared]
    return Comparison(numbers, only_in_one, tolerance)


def _check_steps(a: Rows, b: Rows) -> None:
    if a.keys() == b.keys():
        return
    if not a.keys() & b.keys():
        raise CompareError(
            f"no step in common: the first run has {_steps(a)}, the second {_steps(b)}: compare other runs"
        )
    step = min(a.keys() ^ b.keys())
    which = "first" if step in a else "second"
    raise CompareError(
        f"different steps: the first run has {_steps(a)}, the second {_steps(b)}, and step {step} is only in "
        f"the {which}: compare runs of the same length"
    )


def _steps(rows: Rows) -> str:
    return f"{_count(len(rows))} from {min(rows)} to {max(rows)}"


def _count(num_steps: int) -> str:
    return f"{num_steps} step" + ("s" if num_steps > 1 else "")


def _fields(rows: Rows) -> list[str]:
    """Names of all numbers, in the order in which they appear."""
    return list(dict.fromkeys(name for row in rows.values() for name in row))


def in_words(comparison: Comparison) -> Iterator[str]:
    """The verdict, the first difference, and the largest of each field."""
    steps = _count(comparison.num_steps)
    largest, first = comparison.largest(), comparison.first
    if first is None:
        yield f"bit-equal: {steps}, {', '.join(largest)}"
    else:
        verdict = "within" if comparison.is_close else "not within"
        yield f"{verdict} a tolerance of {comparison.tolerance:g}: {steps}"
        values = " and ".join("nothing" if value is None else str(value) for value in (first.a, first.b))
        yield f"first difference: step {first.step}, {first.field}: {values}"
        yield "largest relative difference:"
        width = max(len(name) for name in largest)
        for name, number in largest.items():
            place = "bit-equal" if number.is_equal else f"{number.relative:.3g} at step {number.step}"
            yield f"  {name:{width}}  {place}"
    if comparison.only_in_one:
        yield f"not compared, as only one of the runs has them: {', '.join(comparison.only_in_one)}"


def as_json(comparison: Comparison) -> str:
    """The same as a JSON object; what is not finite is written as text."""
    first = comparison.first
    fields = {
        name: {"largest_relative_difference": _plain(number.relative), "step": number.step}
        for name, number in comparison.largest().items()
    }
    described = first and {
        "step": first.step,
        "field": first.field,
        "a": _plain(first.a),
        "b": _plain(first.b),
        "relative_difference": _plain(first.relative),
    }
    facts = {
        "bit_equal": comparison.is_bit_equal,
        "within_tolerance": comparison.is_close,
        "tolerance": comparison.tolerance,
        "num_steps": comparison.num_steps,
        "first_difference": described,
        "fields": fields,
        "only_in_one": comparison.only_in_one,
    }
    return json.dumps(facts, indent=2, allow_nan=False)


def _plain(value: float | None) -> Any:
    return value if value is None or math.isfinite(value) else str(value)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=formatter)
    add = parser.add_argument
    add("run_a", type=Path, metavar="RUN_A", help="folder of a run, with metrics.jsonl")
    add("run_b", type=Path, metavar="RUN_B", help="folder of the run to compare it with")
    tolerance = (
        "largest relative difference that counts as equal, a ratio (default: %(default)g, bit for bit)"
    )
    add("--tolerance", type=parse_ratio, default=0.0, metavar="R", help=tolerance)
    add("--json", action="store_true", help="print a JSON object in place of words")
    return parser


def parse_ratio(text: str) -> float:
    """A finite number of at least 0."""
    try:
        ratio = float(text)
    except ValueError:
        ratio = math.nan
    if not (math.isfinite(ratio) and ratio >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a ratio: write a number of at least 0, like 1e-7")
    return ratio


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when the runs are equal, 1 when not, 2 when they cannot be compared."""
    arguments = build_parser().parse_args(argv)

    def command() -> int:
        comparison = compare(read_rows(arguments.run_a), read_rows(arguments.run_b), arguments.tolerance)
        print(as_json(comparison) if arguments.json else "\n".join(in_words(comparison)))
        return 0 if comparison.is_close else 1

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
