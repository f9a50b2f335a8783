"""Which data runs were trained on: the fingerprint of their newest checkpoints."""

from collections.abc import Sequence
from typing import Any

from megalite.report.content import Note, Section, Table
from megalite.report.run import Run
from megalite.report.text import plain

PARTS = ("train", "validation", "former")


def data(runs: Sequence[Run]) -> Section:
    """A table for each part of each run's data, and the versions of what computed."""
    section = Section("Data and versions")
    for run in runs:
        state = run.newest.state if run.newest else {}
        described = state.get("data", {})
        parts = [part for part in PARTS if described.get(part)]
        section.items += [_table(f"{run.name}: {part} data", described[part]) for part in parts]
        if not parts:
            section.items.append(Note(f"{run.name}: no checkpoint says what data it was trained on."))
    versions = [run.newest.state.get("versions", {}) if run.newest else {} for run in runs]
    names = list(dict.fromkeys(name for of_run in versions for name in of_run))
    if names:
        rows = [(name, *(str(of_run.get(name, "-")) for of_run in versions)) for name in names]
        section.items.append(Table("Versions", ("", *(run.name for run in runs)), rows))
    return section


def _table(caption: str, datasets: Sequence[dict[str, Any]]) -> Table:
    """A column for each data set, a row for each thing that is known of it."""
    keys = list(dict.fromkeys(key for dataset in datasets for key in dataset))
    rows = [(key, *(plain(dataset[key]) if key in dataset else "-" for dataset in datasets)) for key in keys]
    names = [str(number) for number in range(1, len(datasets) + 1)] if len(datasets) > 1 else ["value"]
    return Table(caption, ("", *names), rows)
