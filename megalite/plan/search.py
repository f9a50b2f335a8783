"""All layouts of a run on a cluster, the fastest that fit first, and why the others are out (no torch).

Layouts are sorted by a quick estimate of their step. From the fastest on each is asked whether it fits, until
there are enough; these are planned in full and sorted again. Of the slower ones nobody asks whether they fit.
"""

import copy
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, NamedTuple

from megalite.config.run import RunConfig
from megalite.config.section import ConfigError
from megalite.error import UserError
from megalite.model.flops import model_state_bytes
from megalite.plan.job import Job, check_job
from megalite.plan.plan import Plan, make_plan, memory_of_stage, usable_bytes
from megalite.plan.stage import rank_size
from megalite.plan.step_time import RankTimes, quick_step_seconds, rank_times

MICRO_BATCHES = (1, 2, 4, 8, 16)
CHUNKS = (2, 3, 4, 5, 8, 10)
RECOMPUTE = ("none", "selective", "full")
SHORTEST_PART_TOKENS = 1024  # of a sequence on a context-parallel rank; shorter ones only talk
PLANNED_IN_FULL = 24


class Grid(NamedTuple):
    """Sizes of the axes."""

    tp_size: int
    pp_size: int
    cp_size: int
    ep_size: int


class Ways(NamedTuple):
    """How a grid is used."""

    zero_stage: int
    gathering: str
    schedule: str
    num_chunks: int
    recompute: str
    micro_batch: int


@dataclass
class Search:
    """What a search found.

    Attributes:
        plans: the best ones, fastest first.
        num_layouts: looked at, in all.
        ruled_out: how many there were of each reason, none of them in `plans`.
        examples: for each reason what was said of one of them.
    """

    plans: list[Plan] = field(default_factory=list)
    num_layouts: int = 0
    ruled_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def rule_out(self, reason: str, number: int = 1, example: str = "") -> None:
        """Count layouts that are out."""
        self.ruled_out[reason] += number
        if example:
            self.examples.setdefault(reason, example)


def search_layouts(job: Job, num_best: int = 5) -> Search:
    """The best layouts of a run and its global batch on a cluster.

    Raises UserError, in one line, where none fits.
    """
    search = Search()
    timed = sorted(_timed(job, search))
    fitting: list[Job] = []
    tried = 0
    for _, grid, ways in timed:
        if len(fitting) == max(num_best, PLANNED_IN_FULL):
            break
        tried += 1
        candidate = _with_ways(_with_grid(job, grid), ways)
        too_much = _lacking_bytes(candidate)
        if too_much > 0:
            search.rule_out(
                "does not fit into memory", example=f"{name_of(candidate)}: {_gib(too_much)} too much"
            )
        else:
            fitting.append(candidate)
    if not fitting:
        raise UserError(_none_fits(job, search))
    search.rule_out("slower than these, by the quick estimate", len(timed) - tried)
    plans = sorted((make_plan(candidate) for candidate in fitting), key=lambda plan: plan.step.total)
    plans = [plan for plan in plans if plan.fits]
    search.plans = plans[:num_best]
    search.rule_out("slower than these, planned in full", len(fitting) - len(search.plans))
    search.ruled_out += Counter()  # drops zeros
    return search


def name_of(job: Job) -> str:
    """A layout in a word, fit for a file's name."""
    parallel, zero = job.run.parallel, job.deepspeed.zero_stage
    sizes = {"tp": parallel.tp_size, "pp": parallel.pp_size, "cp": parallel.cp_size, "ep": parallel.ep_size}
    parts = [f"{axis}{size}" for axis, size in sizes.items() if size > 1] + [f"dp{job.dp_size}"]
    if parallel.pp_size > 1:
        chunks = f"x{job.placement.num_chunks}" if parallel.pipeline_schedule == "interleaved" else ""
        parts.append(parallel.pipeline_schedule + chunks)
    parts.append(f"zero{zero}")
    if zero == 3 and parallel.parameter_gathering == "micro_batch":
        parts.append("regather")
    parts.append(f"mb{job.deepspeed.train_micro_batch_size_per_gpu}")
    if parallel.recompute != "none":
        parts.append(parallel.recompute)
    return "_".join(parts)


def _timed(job: Job, search: Search) -> Iterator[tuple[float, Grid, Ways]]:
    """Every layout that exists, with its quick estimate."""
    for grid in _grids(job):
        of_grid = _with_grid(job, grid)
        all_ways = list(_ways(of_grid, grid))
        search.num_layouts += len(all_ways)
        try:
            check_job(_with_ways(of_grid, Ways(3, "step", "1f1b", 1, "none", 1)))
        except UserError as error:
            search.rule_out(_reason(error), len(all_ways), str(error))
            continue
        times: dict[tuple[Any, ...], RankTimes] = {}
        for ways in all_ways:
            wrong = _does_not_exist(of_grid, ways)
            if wrong:
                search.rule_out(*wrong)
                continue
            candidate = _with_ways(of_grid, ways)
            key = (ways._replace(schedule="", num_chunks=0), candidate.splits_backward)
            if key not in times:
                times[key] = rank_times(candidate)
            yield quick_step_seconds(candidate, times[key]), grid, ways


def _does_not_exist(job: Job, ways: Ways) -> tuple[str, int, str] | None:
    """Why a grid is not used so: the reason, 1 and an example."""
    batch, samples = job.deepspeed.train_batch_size, ways.micro_batch * job.dp_size
    if batch % samples:
        example = f"{batch} is not divisible by {ways.micro_batch} x {job.dp_size}"
        return "train_batch_size does not divide into micro batch x data-parallel ranks", 1, example
    try:
        job.run.check_zero_stage(ways.zero_stage)
    except ConfigError as error:
        return _reason(error), 1, str(error)
    return None


def _grids(job: Job) -> Iterator[Grid]:
    world, model = job.world_size, job.run.model
    seq_length = job.run.data.seq_length
    cp_sizes = [size for size in divisors(world) if size == 1 or seq_length // size >= SHORTEST_PART_TOKENS]
    tp_sizes = [size for size in divisors(world) if size <= job.devices_per_node]
    pp_sizes = [size for size in divisors(world) if size <= model.num_hidden_layers]
    ep_sizes = divisors(model.n_routed_experts) if model.n_routed_experts else [1]
    for sizes in product(tp_sizes, pp_sizes, cp_sizes, ep_sizes):
        grid = Grid(*sizes)
        data = world // (grid.tp_size * grid.pp_size)
        if world % (grid.tp_size * grid.pp_size * grid.cp_size) == 0 and data % grid.ep_size == 0:
            yield grid


def _ways(job: Job, grid: Grid) -> Iterator[Ways]:
    stages = (0, 1, 2, 3) if job.deepspeed.precision == "fp32" else (1, 2, 3)
    zero = [(stage, "step") for stage in stages] + [(3, "micro_batch")]
    for (stage, gathering), (schedule, chunks) in product(zero, _schedules(job.run, grid.pp_size)):
        for recompute, micro_batch in product(RECOMPUTE, MICRO_BATCHES):
            yield Ways(stage, gathering, schedule, chunks, recompute, micro_batch)


def _schedules(run: RunConfig, pp_size: int) -> Iterator[tuple[str, int]]:
    """All but afab, which waits as 1f1b does and keeps more."""
    yield "1f1b", 1
    if pp_size == 1:
        return
    layers = run.model.num_hidden_layers
    yield from (("interleaved", chunks) for chunks in CHUNKS if layers % (pp_size * chunks) == 0)
    if run.lora.rank == 0:  # adapters leave nothing to split
        yield "zb-h1", 1
        if 2 * pp_size <= layers:
            yield "zbv", 2


def _with_grid(job: Job, grid: Grid) -> Job:
    parallel = job.run.parallel.model_copy(update=grid._asdict() | {"layers_per_stage": None})
    return replace(job, run=job.run.model_copy(update={"parallel": parallel}))


def _with_ways(job: Job, ways: Ways) -> Job:
    parallel = job.run.parallel.model_copy(
        update={
            "parameter_gathering": ways.gathering,
            "pipeline_schedule": ways.schedule,
            "num_chunks": ways.num_chunks if ways.num_chunks > 1 else None,
            "recompute": ways.recompute,
        }
    )
    run = job.run.model_copy(update={"parallel": parallel})
    raw = _raw_with(job.deepspeed.raw, ways)
    facts = {"zero_stage": ways.zero_stage, "train_micro_batch_size_per_gpu": ways.micro_batch, "raw": raw}
    facts["gradient_accumulation_steps"] = None
    return replace(job, run=run, deepspeed=job.deepspeed.model_copy(update=facts))


def _raw_with(raw: dict[str, Any], ways: Ways) -> dict[str, Any]:
    changed = {key: value for key, value in raw.items() if key != "gradient_accumulation_steps"}
    changed["train_micro_batch_size_per_gpu"] = ways.micro_batch
    changed["zero_optimization"] = copy.copy(raw.get("zero_optimization", {})) | {"stage": ways.zero_stage}
    return changed


def _lacking_bytes(job: Job) -> float:
    """What the fullest of first, middle and last stage needs beyond what a device has.

    Where weights, gradients and optimizer alone are too much, no more is counted.
    """
    p, size = job.run.parallel.pp_size, rank_size(job.run, job.shares(0))
    state = model_state_bytes(
        size.trained,
        dp_size=job.data_size,
        zero_stage=job.deepspeed.zero_stage,
        precision=job.deepspeed.precision,
        grad_accum_dtype=job.deepspeed.grad_accum_dtype,
        num_frozen_parameters=size.parameters - size.trained,
    )
    if state.total > usable_bytes(job):
        return state.total - usable_bytes(job)
    needed = (sum(memory_of_stage(job, rank).values()) for rank in sorted({0, p // 2, p - 1}))
    return max(needed) - usable_bytes(job)


def _none_fits(job: Job, search: Search) -> str:
    counted = "; ".join(f"{number} {reason}" for reason, number in search.ruled_out.most_common(3))
    return (
        f"none of {search.num_layouts} layouts runs on {job.world_size} x {job.device.name} ({counted}): use "
        "more devices, or another train_batch_size"
    )


def _reason(error: UserError) -> str:
    """What many errors have in common: without their numbers and remedies."""
    said = str(error).partition(": ")[0]
    return re.sub(r"\b\d+\b", "N", said)


def divisors(number: int) -> list[int]:
    """From 1 to the number itself."""
    return [size for size in range(1, number + 1) if number % size == 0]


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
