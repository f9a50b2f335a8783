"""A run on paper: who sits where, what each rank holds and says, how long it takes (no torch)."""

from dataclasses import asdict, dataclass
from typing import Any

from megalite.model.flops import flops_per_token, num_active_parameters, num_parameters
from megalite.plan.advice import advice
from megalite.plan.communication import Flow, data_flows, stage_flows, transfer_flow
from megalite.plan.interval import CheckpointPlan, checkpoint_plan
from megalite.plan.job import Job, check_job
from megalite.plan.memory import plan_memory
from megalite.plan.stage import rank_size
from megalite.plan.step_time import StepTime, step_time


@dataclass(frozen=True)
class Traffic:
    """What one rank sends in a step of one kind, over one link."""

    what: str
    kind: str
    axis: str
    link: str
    num_ranks: int
    calls_per_step: float
    sent_bytes: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """A run on a cluster, on paper.

    Attributes:
        layers: numbers of the decoder layers of each pipeline rank, chunk by chunk.
        memory: bytes by name, of the rank of each pipeline stage that holds most.
        traffic: of the pipeline rank that sends most.
        usable_bytes: of a device's memory, the reserve left out.
    """

    job: Job
    layers: list[list[range]]
    memory: list[dict[str, int]]
    usable_bytes: float
    traffic: list[Traffic]
    step: StepTime
    checkpoint: CheckpointPlan
    warnings: list[str]

    @property
    def tokens_per_second(self) -> float:
        """Of the whole job."""
        return self.job.tokens_per_step / self.step.total

    @property
    def mfu(self) -> float:
        """Share of the devices' peak that the model's own FLOPs use, as megalite measures it."""
        job = self.job
        flops = flops_per_token(job.run.model, job.run.data.seq_length, job.run.lora)
        fp32 = job.deepspeed.precision == "fp32"
        peak = job.device.peak_tflops_fp32 if fp32 else job.device.peak_tflops
        return self.tokens_per_second * flops / (peak * 1e12 * job.world_size)

    @property
    def days(self) -> float:
        """From the first step to the last, with checkpoints and failures."""
        seconds = self.step.total * self.job.run.schedule.num_steps
        return seconds / (1 - min(0.99, self.checkpoint.lost_fraction)) / 86400

    @property
    def fits(self) -> bool:
        """Whether every rank's memory suffices."""
        return all(sum(rank.values()) <= self.usable_bytes for rank in self.memory)

    def to_json(self) -> dict[str, Any]:
        """The same as plain values; sizes in bytes, times in seconds."""
        job, parallel = self.job, self.job.run.parallel
        model = job.run.model
        return {
            "device": job.device.model_dump(),
            "num_nodes": job.num_nodes,
            "devices_per_node": job.devices_per_node,
            "parameters": num_parameters(model),
            "active_parameters": num_active_parameters(model),
            "grid": {axis: job.topology[axis].size for axis in ("pp", "dp", "cp", "tp", "ep")},
            "zero_stage": job.deepspeed.zero_stage,
            "schedule": parallel.pipeline_schedule,
            "num_chunks": job.placement.num_chunks,
            "num_micro_batches": job.num_micro_batches,
            "tokens_per_step": job.tokens_per_step,
            "layers": [[[one.start, one.stop] for one in chunks] for chunks in self.layers],
            "memory_bytes": self.memory,
            "usable_bytes": self.usable_bytes,
            "traffic": [asdict(row) for row in self.traffic],
            "step_seconds": self.step.total,
            "step_parts_seconds": self.step.parts,
            "bubble_fraction": self.step.bubble_fraction,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "days": self.days,
            "checkpoint": asdict(self.checkpoint),
            "warnings": self.warnings,
        }


def make_plan(job: Job) -> Plan:
    """The plan of a job. Raises ConfigError, in one line, where it does not exist."""
    check_job(job)
    step, memory, usable = step_time(job), memory_of_stages(job), usable_bytes(job)
    layers = [[share.layers for share in job.shares(rank)] for rank in range(job.run.parallel.pp_size)]
    checkpoint = checkpoint_plan(job)
    told = advice(job, step, memory, usable, checkpoint)
    return Plan(job, layers, memory, usable, traffic(job), step, checkpoint, told)


def usable_bytes(job: Job) -> float:
    """Of a device's memory, the reserve left out."""
    return job.device.memory_gib * 2**30 * (1 - job.device.memory_reserve)


def memory_of_stages(job: Job) -> list[dict[str, int]]:
    """Bytes by name, of the first rank of each pipeline stage: the others of a stage hold as much or less."""
    return [memory_of_stage(job, rank) for rank in range(job.run.parallel.pp_size)]


def memory_of_stage(job: Job, pp_rank: int) -> dict[str, int]:
    """Of one pipeline rank."""
    rank = pp_rank * job.topology["pp"].stride
    return plan_memory(job.run, job.deepspeed, job.world_size, rank, device=job.kernels)


def traffic(job: Job) -> list[Traffic]:
    """Of the pipeline rank that sends most, flows of one kind added up."""
    rows = [_traffic_of(job, rank) for rank in range(job.run.parallel.pp_size)]
    return max(rows, key=lambda of_rank: sum(row.sent_bytes for row in of_rank))


def _traffic_of(job: Job, pp_rank: int) -> list[Traffic]:
    m = job.num_micro_batches
    shares = job.shares(pp_rank)
    times = [(flow, m) for share in shares for flow in stage_flows(job, share)]
    times += [
        (flow, 1 if flow.phase == "step" else m) for flow in data_flows(job, rank_size(job.run, shares))
    ]
    last, transfer = job.placement.num_stages - 1, transfer_flow(job)
    for share in shares if last else []:
        ends = share.has_embedding + share.has_head
        times.append((transfer, (2 - ends) * m))  # an activation on, a gradient back
    added: dict[tuple[str, ...], list[tuple[Flow, int]]] = {}
    for flow, number in times:
        key = (flow.axis, flow.what, flow.kind)
        added.setdefault(key, []).append((flow, number))
    return [_added_up(job, flows) for flows in added.values() if flows]


def _added_up(job: Job, flows: list[tuple[Flow, int]]) -> Traffic:
    first = flows[0][0]
    return Traffic(
        what=first.what,
        kind=first.kind,
        axis=first.axis,
        link=first.link,
        num_ranks=first.num_ranks,
        calls_per_step=sum(flow.num_calls * number for flow, number in flows),
        sent_bytes=sum(flow.sent_bytes * number for flow, number in flows),
        seconds=sum(flow.seconds(job.device) * number for flow, number in flows),
    )
