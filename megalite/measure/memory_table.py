"""The memory of ranks as a person reads it: what was planned for each purpose, and what was found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.run import RunConfig
from megalite.plan.memory import MODEL_STATE, plan_memory

MEMORY_FILE = "memory.json"


@dataclass(frozen=True)
class RankMemory:
    """One rank's, in bytes.

    Attributes:
        planned: by what it is for.
        state: what was found of model state, by the same names.
        at_start: before the model was made: libraries and data.
        peak: more than that at the most, from the second step on.
    """

    rank: int
    planned: Mapping[str, int]
    state: Mapping[str, int]
    at_start: int
    peak: int

    def as_json(self) -> dict[str, Any]:
        """For the run's folder; all numbers in bytes."""
        return {
            "rank": self.rank,
            "planned_bytes": dict(self.planned),
            "state_bytes": dict(self.state),
            "at_start_bytes": self.at_start,
            "peak_bytes": self.peak,
        }


def fullest_plan(
    run: RunConfig, deepspeed: DeepSpeedConfig, world_size: int, device: str
) -> tuple[int, dict[str, int]]:
    """The rank for which most is planned, and its plan; ranks of one stage have the same."""
    ranks = range(0, world_size, world_size // run.parallel.pp_size)
    plans = {r: plan_memory(run, deepspeed, world_size, r, device=device) for r in ranks}
    rank = max(plans, key=lambda r: sum(plans[r].values()))
    return rank, plans[rank]


def describe_plan(rank: int, plan: Mapping[str, int]) -> str:
    """One line at the start of a run."""
    parts = ", ".join(f"{name} {_mib(size)}" for name, size in plan.items() if size >= 1 << 20)
    return f"memory   {_mib(sum(plan.values()))} MiB planned for rank {rank}: {parts or 'under 1 MiB each'}"


def describe_memory(ranks: Sequence[RankMemory], *, keeps_blocks: bool = False) -> str:
    """A table of the rank that took most, at the end of a run.

    keeps_blocks: whether freed blocks stay with the process, so that its peak is more than what was alive.
    """
    most = max(ranks, key=lambda rank: rank.peak)
    rows = [(name, _mib(size), _found(most, name)) for name, size in most.planned.items()]
    rows.append(("in all, at the peak", _mib(sum(most.planned.values())), _mib(most.peak)))
    lines = [f"  {name:<20}{planned:>9}{found:>10}" for name, planned, found in rows]
    head = f"memory of rank {most.rank}, MiB"
    after = [f"  beside it {_mib(most.at_start)} MiB of libraries and data, from before the model was made"]
    after += ["  freed blocks were kept: memory.mapped_block_mib=4 takes less, and longer"] * keeps_blocks
    return "\n".join([f"{head:<22}{'planned':>9}{'measured':>10}", *lines, *after])


def _found(memory: RankMemory, name: str) -> str:
    """Model state is seen by name; of what comes and goes the peak alone is."""
    return _mib(memory.state[name]) if name in MODEL_STATE and name in memory.state else ""


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f}"
