"""How busy each expert was, and how far that is from balance."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from megalite.measure.expert_load import expert_loads
from megalite.report.chart import Series, heat_map, line_chart
from megalite.report.content import Chart, Note, Section
from megalite.report.curve import points_of
from megalite.report.run import Run

MOST_COLUMNS = 60  # of a map: more would be finer than a phone shows
MOST_CELLS = 30_000  # of all maps of a run: more make a page slow
VIOLATION = "expert_largest_violation"


def experts(runs: Sequence[Run]) -> Section:
    """The balance of all runs together, then a map of each layer of each run."""
    section = Section("Experts")
    sparse = [run for run in runs if any(VIOLATION in row for row in run.rows)]
    if not sparse:
        section.items.append(Note(f"No run has experts: {', '.join(run.name for run in runs)}."))
        return section
    balance = [Series(run.name, points_of(run.rows, VIOLATION)) for run in sparse]
    section.items.append(
        line_chart("Largest violation", "load of the busiest expert - 1", balance, zero=True)
    )
    for run in sparse:
        section.items += _maps(run)
    others = [run.name for run in runs if run not in sparse]
    if others:
        section.items.append(Note(f"{', '.join(others)}: no experts."))
    return section


def _maps(run: Run) -> Iterator[Note | Chart]:
    """Of each layer. An expert's load is its tokens over the mean of its layer's experts."""
    rows = [dict(row) for row in run.rows if "expert_tokens" in row]
    if not rows:
        yield Note(f"{run.name}: the load of each expert was not recorded.")
        return
    edges, loads = expert_loads(rows, MOST_COLUMNS)
    shown = _spread(list(loads), MOST_CELLS // max(load.size for load in loads.values()))
    if len(shown) < len(loads):
        yield Note(f"{run.name}: {len(shown)} of its {len(loads)} layers with experts are shown.")
    for layer in shown:
        load = loads[layer]
        cells: list[dict[str, Any]] = [
            {"begin": begin, "end": end, "expert": expert, "load": round(float(value), 4)}
            for expert, of_expert in enumerate(load)
            for begin, end, value in zip(edges[:-1].tolist(), edges[1:].tolist(), of_expert, strict=True)
        ]
        first, final = (float(load[:, at].max()) for at in (0, -1))
        told = f"The load of {len(load)} experts; the busiest had {first:.3g} at first, {final:.3g} at last."
        yield heat_map(f"Load of the experts of layer {layer}, {run.name}", cells, len(load), told)


def _spread(layers: Sequence[int], most: int) -> list[int]:
    """At most so many of these layers, but one at least, from the first to the last."""
    if len(layers) <= most:
        return list(layers)
    return [layers[round(at)] for at in np.linspace(0, len(layers) - 1, max(1, most))]
