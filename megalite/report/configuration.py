"""How runs were configured: what differs from the defaults, and everything."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megalite.config.load import load_run
from megalite.report.content import Note, Section, Table
from megalite.report.run import Run
from megalite.report.text import plain

Settings = dict[str, str]  # dotted key -> value


def configuration(runs: Sequence[Run]) -> Section:
    """A column for each run that has a configuration; and what each DeepSpeed JSON states."""
    section = Section("Configuration")
    known = [run for run in runs if run.config is not None]
    section.items += [
        Note(f"{run.name}: its configuration is not known.") for run in runs if run not in known
    ]
    if known:
        settings = [dict(_flat(run.config.model_dump())) for run in known if run.config]
        defaults = dict(_flat(load_run(None).model_dump()))
        names = ("setting", "default", *(run.name for run in known))
        keys = list(dict.fromkeys(key for of_run in [defaults, *settings] for key in of_run))
        rows = [(key, *(of_run.get(key, "-") for of_run in [defaults, *settings])) for key in keys]
        other = [row for row in rows if any(value != row[1] for value in row[2:])]
        section.items.append(Table("What differs from the default run", names, other))
        section.items.append(Table("Every setting", names, rows, folded=True))
    section.items += _deepspeed([run for run in runs if run.deepspeed is not None])
    return section


def _deepspeed(runs: Sequence[Run]) -> Iterator[Table]:
    found = [dict(_flat(run.deepspeed.raw)) for run in runs if run.deepspeed]
    keys = list(dict.fromkeys(key for of_run in found for key in of_run))
    if keys:
        rows = [(key, *(of_run.get(key, "-") for of_run in found)) for key in keys]
        yield Table("DeepSpeed JSON", ("key", *(run.name for run in runs)), rows)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", plain(value)
