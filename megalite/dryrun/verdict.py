"""A dry run: one step of all ranks of a job, in one process, and what was found."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist

from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.run import RunConfig
from megalite.dryrun.groups import build_roster
from megalite.dryrun.links import Traffic, traffic_of
from megalite.dryrun.log import Log
from megalite.dryrun.match import Matching, faults_of_groups
from megalite.dryrun.play import Play
from megalite.dryrun.roster import Roster
from megalite.dryrun.walk import Walk, walk
from megalite.error import UserError
from megalite.model.share import StageShare
from megalite.pipeline.schedule import placement_of
from megalite.training.trainer import shares_of_rank

T = TypeVar("T")
MOST_FAULTS = 8  # that are told: one cause may have many
BF16_BYTES, ALIGNMENT_BYTES = 2, 16  # of the rows of grouped products


class DryRunError(UserError):
    """A job that cannot be walked."""


@dataclass
class Verdict:
    """What a dry run found.

    Attributes:
        roster: the groups of all ranks.
        faults: one line each; none where the step comes to its end.
        walks: what the first rank of each place of a pipeline did.
        traffic: by the name of the group.
        num_entries: of all ranks' logs.
        seconds: by what was done.
    """

    roster: Roster
    faults: list[str] = field(default_factory=list)
    walks: list[Walk] = field(default_factory=list)
    traffic: dict[str, Traffic] = field(default_factory=dict)
    num_entries: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


def dry_run(
    run: RunConfig,
    deepspeed: DeepSpeedConfig,
    world_size: int,
    gpus_per_node: int,
    tell: Callable[[str], None] = lambda line: None,
) -> Verdict:
    """Walk one step of a job of so many ranks; see docs/dry_run.md.

    tell: how it goes on.
    """
    _check_walkable(run, deepspeed)
    clock = _Clock(tell)
    shares = [share for rank in range(run.parallel.pp_size) for share in _shares(run, rank)]
    faults = list(faults_of_layers(shares, run.model.num_hidden_layers))
    with_groups = clock.timed("groups", lambda: build_roster(run, world_size))
    verdict = Verdict(with_groups, faults, seconds=clock.seconds)
    verdict.faults += islice(faults_of_groups(verdict.roster), MOST_FAULTS)
    if verdict.faults:
        return verdict
    verdict.walks, logs = clock.timed("walks", lambda: walk_stages(run, deepspeed, verdict.roster, tell))
    verdict.num_entries = sum(map(len, logs))
    verdict.faults = clock.timed("match and play", lambda: faults_of(logs, verdict.roster))
    verdict.traffic = traffic_of(logs, verdict.roster, gpus_per_node)
    return verdict


def walk_stages(
    run: RunConfig, deepspeed: DeepSpeedConfig, roster: Roster, tell: Callable[[str], None]
) -> tuple[list[Walk], list[Log]]:
    """Walk the first and the last rank at each place of a pipeline.

    Returns the first ones' walks and the log of each rank, which is that of the first of its place. The last
    one has other places along all other axes: its own log is kept where it says another thing.
    """
    walks: list[Walk] = []
    logs: list[Log] = [()] * roster.world_size
    for pp_rank in range(max(roster.pp_ranks) + 1):
        ranks = roster.of_stage(pp_rank)
        first, last = (walk(run, deepspeed, rank, roster.world_size) for rank in (ranks[0], ranks[-1]))
        for rank in ranks:
            logs[rank] = first.log
        if last.log != first.log:
            logs[ranks[-1]] = last.log
        walks.append(first)
        tell(f"ranks {ranks[0]} and {ranks[-1]} walked, place {pp_rank} of the pipeline")
    return walks, logs


def faults_of(logs: Sequence[Log], roster: Roster) -> list[str]:
    """What keeps ranks of these logs from coming to the end of the step, in words."""
    unmatched = list(islice(Matching(logs, roster).faults(), MOST_FAULTS))
    if unmatched:
        return unmatched
    deadlock = Play(logs, roster).run()
    return [deadlock] if deadlock else []


def faults_of_layers(shares: Sequence[StageShare], num_layers: int) -> Iterator[str]:
    """Stages without layers, and layers that are not on just one; shares: of all stages."""
    for stage, share in enumerate(shares):
        if not len(share.layers):
            yield f"stage {stage} of {len(shares)} has no layers: each needs one at least"
    held = [layer for share in shares for layer in share.layers]
    for layer in range(num_layers):
        if held.count(layer) != 1:
            yield f"layer {layer} lies on {held.count(layer)} stages: each belongs to one"


def _shares(run: RunConfig, pp_rank: int) -> list[StageShare]:
    parallel = run.parallel
    placement = placement_of(parallel.pipeline_schedule, parallel.pp_size, parallel.num_chunks)
    return shares_of_rank(run, placement, pp_rank)


def _check_walkable(run: RunConfig, deepspeed: DeepSpeedConfig) -> None:
    """Raise DryRunError for what a walk has no way to say."""
    if not hasattr(dist, "all_gather_single"):
        raise DryRunError(
            f"torch {torch.__version__} has other process groups than 2.13: install 2.13 or later"
        )
    if run.optimizer.name == "muon":
        raise DryRunError(
            "optimizer.name 'muon' exchanges matrices within DeepSpeed's step, which is not walked: add "
            "optimizer.name=adamw, whose passes are the same"
        )
    if not run.model.n_routed_experts:
        return
    if deepspeed.precision != "bf16":
        raise DryRunError(
            f"precision {deepspeed.precision} and experts: torch has grouped products of fake tensors in "
            "bf16 alone, set bf16.enabled in the DeepSpeed JSON"
        )
    inner, tp_size = run.model.moe_intermediate_size or 0, run.parallel.tp_size
    row_bytes = inner // tp_size * BF16_BYTES
    if row_bytes % ALIGNMENT_BYTES:
        raise DryRunError(
            f"model.moe_intermediate_size {inner} / parallel.tp_size {tp_size} makes rows of {row_bytes} "
            f"bytes, and grouped products take multiples of {ALIGNMENT_BYTES}: change one"
        )


class _Clock:
    def __init__(self, tell: Callable[[str], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._tell = tell

    def timed(self, name: str, work: Callable[[], T]) -> T:
        """What the work gives; its seconds are kept by name."""
        start = time.monotonic()
        result = work()
        self.seconds[name] = time.monotonic() - start
        self._tell(f"{name}: {self.seconds[name]:.1f} s")
        return result
