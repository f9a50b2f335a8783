"""What is wrong with a job before it starts, and whom it is told of."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

from megalite.exit_status import FINISHED, MISTAKE, NODE, STORAGE


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong, in one line.

    status: the exit status that it asks for: NODE, MISTAKE or STORAGE.
    nodes: those that are bad, where it is theirs.
    """

    status: int
    text: str
    nodes: tuple[str, ...] = ()


def status_of(faults: Iterable[Fault]) -> int:
    """The exit status for all of them: what another node would not mend comes first."""
    found = {fault.status for fault in faults}
    return next((status for status in (MISTAKE, STORAGE, NODE) if status in found), FINISHED)


def fault_of_nodes(what: str, bad: Mapping[str, str], all_nodes: Iterable[str]) -> list[Fault]:
    """Something that all nodes are to see, and some do not: theirs if they are few, else a mistake.

    bad: node -> why, for those that do not.
    """
    if 2 * len(bad) < len(set(all_nodes)):
        return [Fault(NODE, f"{node}: {what}: {why}", (node,)) for node, why in sorted(bad.items())]
    reasons = sorted(set(bad.values()))
    return [Fault(MISTAKE, f"{what}: {reasons[0]} (on {', '.join(sorted(bad))})")] if bad else []


def spans(ranks: Iterable[int]) -> str:
    """Ranks as a person writes them: 0-3, 8."""
    runs = groupby(enumerate(sorted(ranks)), key=lambda at: at[1] - at[0])
    ends = [[rank for _, rank in run] for _, run in runs]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in ends)
