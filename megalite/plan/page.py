"""A plan for people: aligned tables in plain text (no torch)."""

from collections.abc import Sequence

from megalite.model.flops import num_active_parameters, num_parameters
from megalite.plan.plan import Plan

GIB = 2**30


def page_of(plan: Plan) -> str:
    """The whole plan."""
    parts = [_head(plan), _layout(plan), _memory(plan), _traffic(plan), _step(plan), _run(plan)]
    parts.append(_warnings(plan))
    return "\n\n".join(parts)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns under the first row: the first to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        return "  ".join(["", row[0].ljust(len(first)), *others]).rstrip()

    return "\n".join(map(line, rows))


def seconds_in_words(seconds: float) -> str:
    """With a unit that suits them."""
    for unit, size in (("days", 86400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1e3:.2f} ms"


def bytes_in_words(size: float) -> str:
    """In GiB, MiB or KiB."""
    for unit, one in (("TiB", 2**40), ("GiB", GIB), ("MiB", 2**20)):
        if size >= one:
            return f"{size / one:,.1f} {unit}"
    return f"{size / 2**10:,.1f} KiB"


def layers_in_words(chunks: Sequence[range]) -> str:
    """Such as "0-19" or "0-4 and 40-44"."""
    return " and ".join(f"{one.start}-{one.stop - 1}" if len(one) > 1 else f"{one.start}" for one in chunks)


def _head(plan: Plan) -> str:
    job, model = plan.job, plan.job.run.model
    active = f", {num_active_parameters(model):,} active per token" if model.n_routed_experts else ""
    nodes = f"{job.num_nodes} node{'s' if job.num_nodes > 1 else ''} of {job.devices_per_node}"
    return (
        f"model    {num_parameters(model):,} parameters{active}\n"
        f"machine  {nodes} x {job.device.name} = {job.world_size} ranks"
    )


def _layout(plan: Plan) -> str:
    job, parallel = plan.job, plan.job.run.parallel
    size = {axis: job.topology[axis].size for axis in ("tp", "cp", "pp", "dp", "ep")}
    grid = f"tensor {size['tp']} x context {size['cp']} x pipeline {size['pp']} x data {size['dp']}"
    experts = f", experts over {size['ep']}" if size["ep"] > 1 else ""
    chunks = f" of {job.placement.num_chunks} chunks" if job.placement.num_chunks > 1 else ""
    schedule = f", {parallel.pipeline_schedule}{chunks}" if parallel.pp_size > 1 else ""
    zero = f"ZeRO-{job.deepspeed.zero_stage}"
    if job.deepspeed.zero_stage == 3:
        zero += f", gathered per {parallel.parameter_gathering.replace('_', ' ')}"
    micro = job.deepspeed.train_micro_batch_size_per_gpu
    rows = [["pipeline rank", "decoder layers", "layers"]]
    for rank, of_rank in enumerate(plan.layers):
        rows.append([str(rank), layers_in_words(of_rank), str(sum(map(len, of_rank)))])
    lines = (
        f"layout   {grid}{experts}{schedule}; {zero}, {job.deepspeed.precision}, recompute "
        f"{parallel.recompute}\n"
        f"batch    {job.deepspeed.train_batch_size:,} samples = {size['dp']} data-parallel ranks x "
        f"{job.num_micro_batches} micro batches x {micro}; {job.tokens_per_step:,} tokens per step"
    )
    return f"{lines}\n\n{table(rows)}" if len(plan.layers) > 1 else lines


def _memory(plan: Plan) -> str:
    totals = [sum(of_rank.values()) for of_rank in plan.memory]
    fullest = max(range(len(totals)), key=totals.__getitem__)
    shown = sorted({0, fullest, len(totals) - 1})
    names = [name for name in plan.memory[fullest] if any(plan.memory[rank].get(name) for rank in shown)]
    heads = [f"rank {rank}" + (" (most)" if rank == fullest and len(shown) > 1 else "") for rank in shown]
    rows = [["memory of a pipeline rank", *heads]]
    for name in names:
        rows.append([name, *(bytes_in_words(plan.memory[rank].get(name, 0)) for rank in shown)])
    rows.append(["total", *(bytes_in_words(totals[rank]) for rank in shown)])
    rows.append(
        ["of what a device has to use", *(f"{totals[rank] / plan.usable_bytes:.0%}" for rank in shown)]
    )
    return table(rows)


def _traffic(plan: Plan) -> str:
    rows = [["sent by a rank in a step", "by", "over", "link", "calls", "bytes", "alone"]]
    for flow in plan.traffic:
        calls = f"{flow.calls_per_step:,.0f}"
        sent, seconds = bytes_in_words(flow.sent_bytes), seconds_in_words(flow.seconds)
        over = f"{flow.axis} ({flow.num_ranks})"
        rows.append([flow.what, flow.kind, over, flow.link, calls, sent, seconds])
    return table(rows) if len(rows) > 1 else "  one rank sends nothing"


def _step(plan: Plan) -> str:
    rows = [["a step of the busiest rank", "time", "share"]]
    for name, seconds in plan.step.parts.items():
        rows.append([name, seconds_in_words(seconds), f"{seconds / plan.step.total:.1%}"])
    rows.append(["step", seconds_in_words(plan.step.total), "100.0%"])
    return table(rows)


def _run(plan: Plan) -> str:
    saved, job = plan.checkpoint, plan.job
    steps = max(1, round(saved.interval_seconds / plan.step.total))
    per_device = plan.tokens_per_second / job.world_size
    return (
        f"speed    {plan.tokens_per_second:,.0f} tokens/s, {per_device:,.0f} per device, MFU {plan.mfu:.1%}\n"
        f"run      {job.run.schedule.num_steps:,} steps, "
        f"{job.run.schedule.num_steps * job.tokens_per_step:,} tokens, "
        f"{plan.days:,.1f} days with checkpoints and failures\n"
        f"saving   {bytes_in_words(saved.size_bytes)} per checkpoint, "
        f"{seconds_in_words(saved.write_seconds)} to write; a failure every "
        f"{seconds_in_words(saved.hours_between_failures * 3600)}: save every "
        f"{seconds_in_words(saved.interval_seconds)} ({steps:,} steps; Daly), "
        f"{saved.lost_fraction:.1%} of the time is lost"
    )


def _warnings(plan: Plan) -> str:
    if not plan.warnings:
        return "no warnings"
    return "\n".join(f"warning  {line}" for line in plan.warnings)
