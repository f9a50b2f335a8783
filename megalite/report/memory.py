"""What each byte of a rank is for, planned and measured, where the run has a memory.json."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from megalite.inspection.table import bytes_in_words
from megalite.measure.memory_table import MEMORY_FILE, RankMemory
from megalite.report.chart import Bar, bar_chart
from megalite.report.content import Chart, Note, Section, Table
from megalite.report.run import Run

MOST_RANKS = 4  # of a run: those that took most
REST = "not told apart"
Sizes = Mapping[str, int]  # name -> bytes


def memory(runs: Sequence[Run]) -> Section:
    """A chart and a table for each run."""
    section = Section("Memory")
    for run in runs:
        if not run.memory:
            section.items.append(Note(f"{run.name}: no {MEMORY_FILE} in its folder."))
            continue
        shown = sorted(sorted(run.memory, key=lambda one: -one.peak)[:MOST_RANKS], key=lambda one: one.rank)
        counts = {name: sizes for one in shown for name, sizes in _counts(one)}
        section.items += [_chart(run, counts), _table(run, shown, counts)]
        if len(shown) < len(run.memory):
            told = f"{run.name}: of {len(run.memory)} ranks the {len(shown)} that took most are shown."
            section.items.append(Note(told))
    return section


def _counts(one: RankMemory) -> Iterator[tuple[str, Sizes]]:
    """A rank's plan; and its peak, of which model state alone is known by name."""
    yield f"rank {one.rank} planned", one.planned
    rest = one.peak - sum(one.state.values())
    yield f"rank {one.rank} measured", {**one.state, REST: max(0, rest)}


def _chart(run: Run, counts: Mapping[str, Sizes]) -> Chart:
    bars = [bar for row, sizes in counts.items() for bar in _bars(row, sizes)]
    totals = ", ".join(f"{row} {bytes_in_words(sum(sizes.values()))}" for row, sizes in counts.items())
    title = f"Memory of {run.name} at the peak, by name"
    return bar_chart(title, "bytes", bars, f"Bytes by name. {totals}.", _names(counts))


def _bars(row: str, sizes: Sizes) -> Iterator[Bar]:
    for (name, size), end in zip(sizes.items(), accumulate(sizes.values()), strict=True):
        yield Bar(row, end - size, end, name, f"{name}: {bytes_in_words(size)}")


def _table(run: Run, ranks: Sequence[RankMemory], counts: Mapping[str, Sizes]) -> Table:
    rows = [(name, *(_size(sizes.get(name)) for sizes in counts.values())) for name in _names(counts)]
    total = ("in all, at the peak", *(bytes_in_words(sum(sizes.values())) for sizes in counts.values()))
    at_start = (cell for one in ranks for cell in ("-", bytes_in_words(one.at_start)))
    before = ("beside it, before the model was made", *at_start)
    return Table(f"Memory of {run.name}", ("", *counts), [*rows, total, before])


def _names(counts: Mapping[str, Sizes]) -> list[str]:
    """Of all columns; what has no name comes last."""
    names = dict.fromkeys(name for sizes in counts.values() for name in sizes)
    return sorted(names, key=lambda name: name == REST)


def _size(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else bytes_in_words(num_bytes)
