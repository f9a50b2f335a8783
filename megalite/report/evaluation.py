"""What was measured of a model by tasks: while it trained, and by tools/evaluate.py."""

from collections.abc import Sequence

from megalite.evaluation.record import HEADINGS, Evaluation, cells_of
from megalite.report.chart import Series, line_chart
from megalite.report.content import Note, Section, Table
from megalite.report.curve import last, points_of
from megalite.report.run import Run
from megalite.report.text import at_step

PREFIX = "evaluation/"


def evaluation(runs: Sequence[Run]) -> Section:
    """Curves of tasks, their last numbers side by side, and a table for each record."""
    section = Section("Evaluation")
    metrics = sorted({name for run in runs for row in run.rows for name in row if name.startswith(PREFIX)})
    for name in metrics:
        series = [Series(run.name, points_of(run.rows, name), "task", dotted=True) for run in runs]
        drawn = [one for one in series if one.points]
        section.items += [line_chart(name.removeprefix(PREFIX), "value", drawn)] if drawn else []
    if metrics:
        rows = [
            (name.removeprefix(PREFIX), *(at_step(last(run.rows, name)) for run in runs)) for name in metrics
        ]
        section.items.append(Table("Tasks, while it trained", ("", *(run.name for run in runs)), rows))
    for run in runs:
        records = [_record(run, file, record) for file, record in run.evaluations.items()]
        found = any(name in row for row in run.rows for name in metrics)
        nothing = [] if records or found else [Note(f"{run.name}: nothing was evaluated.")]
        section.items += [*records, *nothing]
    return section


def _record(run: Run, file: str, record: Evaluation) -> Table:
    step = record.origin.get("step")
    of_step = "" if step is None else f", step {step:,}"
    return Table(f"{run.name}: {file}{of_step}", HEADINGS, [cells_of(one) for one in record.measurements])
