"""Tiny jobs of 16 ranks for dry runs, and their logs with a fault planted on one rank."""

from dataclasses import dataclass, replace
from functools import cache

from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.run import RunConfig
from megalite.dryrun.groups import build_roster
from megalite.dryrun.log import Entry, Exchange, Log, Passage
from megalite.dryrun.roster import Roster
from megalite.dryrun.verdict import walk_stages
from tests.trainers import EXPERTS, Case, deepspeed_config, deepspeed_of, run_config

# Rows that grouped products take: of 16 bytes in bf16, over two ranks of tp.
ALIGNED = EXPERTS.model_copy(update={"moe_intermediate_size": 32})


@dataclass(frozen=True)
class DryJob:
    """What a dry run is of."""

    run: RunConfig
    deepspeed: DeepSpeedConfig
    world_size: int


def job_of(case: Case, num_micro_batches: int | None = None) -> DryJob:
    """num_micro_batches: of a step; by default those of tests/trainers.py."""
    has_experts = case.model_kind == "experts"
    run = run_config(case, model=ALIGNED) if has_experts else run_config(case)
    sizes = deepspeed_of(case, num_micro_batches) if num_micro_batches else deepspeed_config(case)
    return DryJob(run, sizes, case.world_size)


@cache
def sound_logs() -> tuple[list[Log], Roster]:
    """Of a job whose step comes to its end: four stages of four ranks, tp 2 x dp 2; two micro batches."""
    job = job_of(Case(tp=2, pp=4, dp=2))
    roster = build_roster(job.run, job.world_size)
    return walk_stages(job.run, job.deepspeed, roster, lambda line: None)[1], roster


def with_log(rank: int, entries: list[Entry]) -> list[Log]:
    """The sound logs, but for one rank's."""
    logs = list(sound_logs()[0])
    logs[rank] = tuple(entries)
    return logs


def own_entries(rank: int) -> list[Entry]:
    return list(sound_logs()[0][rank])


def sends_of(entries: list[Entry]) -> list[int]:
    """Where something is sent."""
    return [at for at, e in enumerate(entries) if isinstance(e, Exchange) and e.passages[0].verb == "send"]


def redirected(entry: Entry, offset: int) -> Exchange:
    assert isinstance(entry, Exchange)
    passage: Passage = entry.passages[0]
    return replace(entry, passages=(replace(passage, offset=offset),))
