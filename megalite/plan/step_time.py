"""How long an optimizer step takes, and where it goes (no torch)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megalite.config.device import DeviceConfig
from megalite.model.share import StageShare
from megalite.plan.communication import Flow, Phase, data_flows, stage_flows, transfer_flow
from megalite.plan.idle import Played, StageCosts, idle_seconds, play_step
from megalite.plan.job import Job
from megalite.plan.stage import rank_size
from megalite.plan.work import Seconds, gathering_seconds, optimizer_seconds, stage_seconds

PASSES: tuple[Phase, ...] = ("forward", "backward_input", "backward_weight")


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, of the rank that computes longest.

    Attributes:
        total: of the step.
        parts: where these go, by name; their sum is the total.
        bubble_fraction: the share of all ranks' time that they wait for other stages.
    """

    total: float
    parts: dict[str, float]
    bubble_fraction: float


@dataclass(frozen=True)
class _StagePass:
    """One stage and one micro batch: what is computed, and what communication adds, by phase and axis."""

    work: Seconds
    added: dict[Phase, dict[str, float]]

    def of(self, phase: Phase) -> float:
        computed: float = getattr(self.work, phase)
        return computed + sum(self.added[phase].values())

    @property
    def total(self) -> float:
        return sum(map(self.of, PASSES))


def step_time(job: Job) -> StepTime:
    """By the schedule's lists, with each stage's own times."""
    stages = _all_stages(job)
    costs = StageCosts(*([stage.of(phase) for stage in stages] for phase in PASSES))
    parallel, chunks = job.run.parallel, job.placement.num_chunks
    schedule, transfer = parallel.pipeline_schedule, transfer_flow(job).seconds(job.device)
    sizes = parallel.pp_size, job.num_micro_batches, chunks
    return _put_together(job, stages, play_step(schedule, *sizes, costs, transfer))


@dataclass(frozen=True)
class RankTimes:
    """Of a rank, its chunks taken together, in seconds; the same for all schedules that split backward alike.

    Attributes:
        slowest: of one micro batch, on the slowest rank.
        forward, backward_input, backward_weight: of one on a rank without ends.
        after: once per step, on the slowest rank.
        transfer: from a rank to the next.
    """

    slowest: float
    forward: float
    backward_input: float
    backward_weight: float
    after: float
    transfer: float


def rank_times(job: Job) -> RankTimes:
    """Of the first, the second (which has a layer more where they do not divide) and the last rank."""
    p = job.run.parallel.pp_size
    shares = {rank: _as_one(job.shares(rank)) for rank in sorted({0, 1 % p, p - 1})}
    passes = {rank: _rank_passes(job, [share])[0] for rank, share in shares.items()}
    slowest = max(passes, key=lambda rank: passes[rank].total)
    after = sum(_after_the_passes(job, [shares[slowest]], passes[slowest].work.total).values())
    transfer = transfer_flow(job).seconds(job.device) if p > 1 else 0.0
    forward, backward_input, backward_weight = map(passes[1 % p].of, PASSES)
    slowest_seconds = passes[slowest].total
    return RankTimes(slowest_seconds, forward, backward_input, backward_weight, after, transfer)


def quick_step_seconds(job: Job, times: RankTimes) -> float:
    """By the published formulas for idle time, with the slowest stages: what a search sorts by."""
    p, m, chunks = job.run.parallel.pp_size, job.num_micro_batches, job.placement.num_chunks
    forward, backward, weight = times.forward, times.backward_input, times.backward_weight
    if job.splits_backward:
        weight = min(weight, forward, backward)  # where the formulas hold
    idle = idle_seconds(job.run.parallel.pipeline_schedule, p, chunks, forward, backward, weight)
    total = m * times.slowest + idle + 2 * (p - 1) * chunks * times.transfer + times.after
    return max(total, _shared_processors(job, [m * times.slowest + times.after]))


def _as_one(shares: Sequence[StageShare]) -> StageShare:
    """A rank's chunks as one share: what counts is how many layers there are, and which ends."""
    return StageShare(
        range(shares[0].layers.start, shares[0].layers.start + sum(len(share.layers) for share in shares)),
        has_embedding=any(share.has_embedding for share in shares),
        has_head=any(share.has_head for share in shares),
    )


def _all_stages(job: Job) -> list[_StagePass]:
    placement, p = job.placement, job.run.parallel.pp_size
    passes = {rank: _rank_passes(job, job.shares(rank)) for rank in range(p)}
    held = (placement.holder(stage) for stage in range(placement.num_stages))
    return [passes[rank][chunk] for rank, chunk in held]


def _rank_passes(job: Job, shares: Sequence[StageShare]) -> list[_StagePass]:
    size = rank_size(job.run, shares)
    of_data = [flow for flow in data_flows(job, size) if flow.phase != "step"]
    return [
        _stage_pass(job, stage_seconds(job, s), stage_flows(job, s), of_data, len(shares)) for s in shares
    ]


def _stage_pass(
    job: Job, work: Seconds, flows: Iterable[Flow], of_data: Iterable[Flow], num_chunks: int
) -> _StagePass:
    added: dict[Phase, dict[str, float]] = {phase: {} for phase in PASSES}
    for phase in PASSES:
        shown: dict[str, float] = {}
        hidden: dict[str, float] = {}
        weighted = [(flow, 1.0) for flow in flows] + [(flow, 1 / num_chunks) for flow in of_data]
        for flow, share in weighted:
            if flow.phase == phase:
                into = hidden if flow.is_hidden else shown
                into[flow.axis] = into.get(flow.axis, 0.0) + share * flow.seconds(job.device)
        left = _not_hidden(job.device, hidden, getattr(work, phase))
        added[phase] = {axis: shown.get(axis, 0.0) + left.get(axis, 0.0) for axis in {**shown, **left}}
    return _StagePass(work, added)


def _not_hidden(device: DeviceConfig, hidden: dict[str, float], computing: float) -> dict[str, float]:
    """What remains of communication beside so many seconds of computation."""
    total = sum(hidden.values())
    remains = max(total * (1 - device.overlap), total - device.overlap * computing)
    return {axis: seconds * remains / total for axis, seconds in hidden.items() if total}


def _after_the_passes(job: Job, shares: Sequence[StageShare], computing: float) -> dict[str, float]:
    """Once per step: gathering, reduction and update. computing: seconds of one micro batch."""
    shown: dict[str, float] = {}
    hidden: dict[str, float] = {}
    size = rank_size(job.run, shares)
    for flow in data_flows(job, size):
        if flow.phase == "step":
            into = hidden if flow.is_hidden else shown
            into[flow.axis] = into.get(flow.axis, 0.0) + flow.seconds(job.device)
    left = _not_hidden(job.device, hidden, computing)
    parts = {f"{axis} communication": shown.get(axis, 0) + left.get(axis, 0) for axis in {**shown, **left}}
    parts |= {"optimizer": optimizer_seconds(job, size.trained)}
    return parts | {"gathering": gathering_seconds(job, size.num_layers)}


def _put_together(job: Job, stages: Sequence[_StagePass], played: Played) -> StepTime:
    rank = max(range(len(played.busy_seconds)), key=lambda rank: played.busy_seconds[rank])
    placement, m = job.placement, job.num_micro_batches
    own = [stages[placement.stage(rank, chunk)] for chunk in range(placement.num_chunks)]
    again = m * sum(stage.work.recomputed for stage in own)
    parts = {"computation": m * sum(stage.work.total for stage in own) - again, "recomputation": again}
    for stage in own:
        for phase in PASSES:
            for axis, seconds in stage.added[phase].items():
                name = f"{axis} communication"
                parts[name] = parts.get(name, 0.0) + m * seconds
    parts["waiting for stages"] = played.waiting_seconds(rank)
    after = _after_the_passes(job, job.shares(rank), sum(stage.work.total for stage in own))
    parts = {name: parts.get(name, 0.0) + after.get(name, 0.0) for name in {**parts, **after}}
    total, after_seconds = sum(parts.values()), sum(after.values())
    shared = _shared_processors(job, [busy + after_seconds for busy in played.busy_seconds])
    if shared > total:
        parts["waiting for processors"] = shared - total
    parts = {name: seconds for name, seconds in parts.items() if seconds > 0}
    return StepTime(max(total, shared), parts, played.bubble_fraction)


def _shared_processors(job: Job, busy_seconds: Sequence[float]) -> float:
    """What the ranks of a node need if they share fewer processors; 0 where each has its own."""
    processors = job.device.processors_per_node
    if processors is None:
        return 0.0
    mean_busy = sum(busy_seconds) / len(busy_seconds)
    return mean_busy * job.devices_per_node / processors
