"""What happened to a run: starts, saves, steps that were skipped or taken back, numbers that were none."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from megalite.inspection.table import bytes_in_words
from megalite.report.content import Note, Section, Table
from megalite.report.run import Run
from megalite.report.text import time_of

COUNTS = {
    "skipped_steps": ("skip", "step skipped by the guard"),
    "rollbacks": ("rollback", "went back to a checkpoint before this step, and left samples out"),
    "failed_saves": ("fault", "a save had failed"),
}
STALL = "save_stall_seconds"
MOST_MARKS, MOST_SAVES = 60, 100
MARKED = ("resume", "skip", "rollback", "fault")


class Event(NamedTuple):
    """One thing that happened at or after a step; at_seconds since 1970, where it is known."""

    step: int
    kind: str
    text: str
    at_seconds: float | None = None


def events(runs: Sequence[Run]) -> Section:
    """A table for each run."""
    section = Section("Events")
    for run in runs:
        found = events_of(run)
        saves = [event for event in found if event.kind == "save"]
        hidden = set(saves[:-MOST_SAVES])
        rows = [(f"{e.step:,}", e.kind, e.text, time_of(e.at_seconds)) for e in found if e not in hidden]
        if rows:
            headings = ("step", "event", "what", "when")
            section.items.append(Table(f"Events of {run.name}", headings, rows, folded=len(rows) > 40))
        else:
            section.items.append(Note(f"{run.name}: nothing but steps was recorded."))
        if hidden:
            section.items.append(Note(f"{run.name}: {len(hidden):,} earlier saves are not shown."))
        if not run.starts:
            section.items.append(Note(f"{run.name}: no TensorBoard files, so its starts are not known."))
    return section


def events_of(run: Run) -> list[Event]:
    """All that is known, in the order of steps."""
    found = [*_starts(run), *_counted(run.rows), *_not_numbers(run.rows), *_saves(run)]
    return sorted(found, key=lambda event: event.step)


def marks_of(run: Run) -> dict[int, str]:
    """step -> what happened there but saves, for a chart; the first of very many."""
    marks: dict[int, str] = {}
    for event in events_of(run):
        if event.kind in MARKED and (event.step in marks or len(marks) < MOST_MARKS):
            marks[event.step] = f"{marks[event.step]}; {event.text}" if event.step in marks else event.text
    return marks


def _starts(run: Run) -> Iterator[Event]:
    for number, start in enumerate(run.starts):
        told = "began" if start.step == 0 else f"went on after step {start.step:,}"
        yield Event(start.step, "resume" if number else "start", told, start.at_seconds)


def _counted(rows: Sequence[Mapping[str, Any]]) -> Iterator[Event]:
    """Where the counts that rows carry have grown; what the first row has happened before it."""
    for before, row in pairwise([{}, *rows]):
        for name, (kind, text) in COUNTS.items():
            more = row.get(name, 0) - before.get(name, 0)
            if more > 0:
                yield Event(row["step"], kind, text if more == 1 else f"{text} ({more:,} times)")


def _not_numbers(rows: Sequence[Mapping[str, Any]]) -> Iterator[Event]:
    for row in rows:
        none = [name for name, value in row.items() if value is None]
        if none:
            yield Event(row["step"], "fault", f"{', '.join(none)}: not a finite number")


def _saves(run: Run) -> Iterator[Event]:
    """Saves that held up training, which the row after them tells, and checkpoints that are there."""
    told = {
        row["step"] - 1: f"training stood still for {row[STALL]:.3g} s" for row in run.rows if row.get(STALL)
    }
    kept = {item.step: item for item in run.checkpoints}
    for step in sorted(told.keys() | kept.keys()):
        item = kept.get(step)
        words = [told[step]] if step in told else []
        if item is None:
            yield Event(step, "save", "; ".join([*words, "no longer there"]))
            continue
        words.append(f"{bytes_in_words(item.size_bytes)} in {item.folder.name}")
        kind = "save" if item.is_valid else "fault"
        damage = [*item.damage, *item.base_damage][:1]
        yield Event(step, kind, "; ".join([*words, *damage]), item.saved_at_seconds)
