"""What will not fit, or will be slow, each in one line with its remedy (no torch)."""

from collections.abc import Iterator, Sequence

from megalite.plan.cut import balanced_cut, with_layers
from megalite.plan.interval import CheckpointPlan
from megalite.plan.job import Job
from megalite.plan.step_time import StepTime, step_time

MUCH_WAITING, MUCH_TALKING, MUCH_AGAIN, MUCH_LOST = 0.15, 0.25, 0.15, 0.05  # of a step, of a run
MUCH_GAINED = 0.03  # of a step


def advice(
    job: Job, step: StepTime, memory: Sequence[dict[str, int]], usable: float, checkpoint: CheckpointPlan
) -> list[str]:
    """The warnings of a plan, what does not fit first."""
    return [
        *_of_memory(job, memory, usable),
        *_of_waiting(job, step),
        *_of_communication(job, step),
        *_of_computation(job, step),
        *_of_saving(job, step, checkpoint),
    ]


def _of_memory(job: Job, memory: Sequence[dict[str, int]], usable: float) -> Iterator[str]:
    totals = [sum(of_rank.values()) for of_rank in memory]
    rank = max(range(len(totals)), key=totals.__getitem__)
    if totals[rank] <= usable:
        return
    name, size = max(memory[rank].items(), key=lambda item: item[1])
    yield (
        f"does not fit: pipeline rank {rank} needs {totals[rank] / 2**30:.1f} GiB and a device has "
        f"{usable / 2**30:.1f} GiB to use; most is for {name} ({size / 2**30:.1f} GiB): {_remedy(job, name)}"
    )


def _remedy(job: Job, name: str) -> str:
    parallel, zero = job.run.parallel, job.deepspeed.zero_stage
    if "activation" in name or "logits" in name:
        if parallel.recompute != "full":
            return "set parallel.recompute=full, or a smaller train_micro_batch_size_per_gpu"
        return "use a smaller train_micro_batch_size_per_gpu, or a larger parallel.tp_size or cp_size"
    if "gathered" in name or "live" in name:
        return "set parallel.parameter_gathering=micro_batch, or a larger parallel.tp_size or pp_size"
    if zero < 3:
        return f"set zero_optimization.stage to {zero + 1} or more in the DeepSpeed JSON"
    return "use more devices, or a larger parallel.tp_size or pp_size"


def _of_waiting(job: Job, step: StepTime) -> Iterator[str]:
    if step.bubble_fraction > MUCH_WAITING:
        m, p = job.num_micro_batches, job.run.parallel.pp_size
        yield (
            f"stages wait {step.bubble_fraction:.0%} of the time, with {m} micro batches for {p} stages: use "
            "a smaller parallel.pp_size, more micro batches, or parallel.pipeline_schedule=interleaved or zbv"
        )
    layers = balanced_cut(job) if job.run.parallel.pp_size > 1 else []
    gain = step.total / step_time(with_layers(job, layers)).total - 1 if layers else 0.0
    if gain > MUCH_GAINED:
        yield (
            f"stages are not equal, embedding and head counted: a step is {gain:.0%} faster, where memory "
            f"allows, with parallel.layers_per_stage=[{','.join(map(str, layers))}]"
        )


def _of_communication(job: Job, step: StepTime) -> Iterator[str]:
    remedies = {
        "tp": "use a smaller parallel.tp_size, or larger micro batches",
        "cp": "use a smaller parallel.cp_size, or parallel.context_attention=ring",
        "ep": "use a parallel.ep_size within a node",
        "dp": _remedy_of_data(job),
        "edp": _remedy_of_data(job),
    }
    for axis, remedy in remedies.items():
        share = step.parts.get(f"{axis} communication", 0.0) / step.total
        if share > MUCH_TALKING:
            yield f"{axis} communication takes {share:.0%} of a step: {remedy}"
    parallel = job.run.parallel
    if parallel.ep_size * parallel.tp_size > job.devices_per_node:
        yield (
            f"experts' tokens cross the network: parallel.ep_size {parallel.ep_size} x tp_size "
            f"{parallel.tp_size} exceeds the {job.devices_per_node} devices of a node: use a smaller ep_size"
        )


def _remedy_of_data(job: Job) -> str:
    parallel, zero = job.run.parallel, job.deepspeed.zero_stage
    if zero == 3 and parallel.parameter_gathering == "micro_batch":
        return "set parallel.parameter_gathering=step"
    if zero >= 2:
        return "use fewer micro batches of more samples, or zero_optimization.stage 1 if it fits"
    return "use a larger train_batch_size, or a larger parallel.pp_size, so that each rank holds less"


def _of_computation(job: Job, step: StepTime) -> Iterator[str]:
    again = step.parts.get("recomputation", 0.0) / step.total
    if again > MUCH_AGAIN:
        yield (
            f"{again:.0%} of a step is recomputation: set parallel.recompute=selective or none where memory "
            "allows, or smaller micro batches"
        )
    rows = job.tokens_per_micro_batch
    if rows < 1024 and job.device.processors_per_node is None:
        yield (
            f"a micro batch is {rows} tokens on a rank, too few to fill a {job.device.name}: use a larger "
            "train_micro_batch_size_per_gpu"
        )


def _of_saving(job: Job, step: StepTime, plan: CheckpointPlan) -> Iterator[str]:
    if plan.lost_fraction > MUCH_LOST:
        yield (
            f"{plan.lost_fraction:.0%} of the time goes to checkpoints and to work done again after "
            "failures: use faster storage, or checkpoint.local_dir on the nodes' own disks"
        )
    interval = job.run.checkpoint.save_every_steps * step.total
    if not job.run.checkpoint.save_every_steps:
        yield "checkpoint.save_every_steps is 0, and a failure would lose the whole run: set it"
    elif interval > 3 * plan.interval_seconds and job.run.schedule.num_steps * step.total > interval:
        steps = max(1, round(plan.interval_seconds / step.total))
        yield (
            f"checkpoint.save_every_steps {job.run.checkpoint.save_every_steps} is every "
            f"{interval / 3600:.1f} hours, and a failure is to be expected every "
            f"{plan.hours_between_failures:.0f} hours: set checkpoint.save_every_steps={steps}"
        )
