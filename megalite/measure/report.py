"""What a run says of itself at its start and its end."""

import resource

import torch

from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.model import ModelConfig
from megalite.config.run import RunConfig
from megalite.model.flops import model_state_bytes_per_rank, num_active_parameters, num_parameters
from megalite.parallel.context import ParallelContext
from megalite.parallel.topology import DATA_AXES


def describe_run(run: RunConfig, deepspeed: DeepSpeedConfig, context: ParallelContext, peak: str) -> str:
    """The derived numbers that a person checks before a run is left alone."""
    batch, micro = deepspeed.train_batch_size, deepspeed.train_micro_batch_size_per_gpu
    tp_size, pp_size, dp_size = (context[axis].size for axis in ("tp", "pp", "dp"))
    num_micro_batches = deepspeed.num_micro_batches(dp_size)
    layout = f"tensor {tp_size} x pipeline {pp_size} x data {dp_size}"
    if context["ep"].size > 1:
        layout += f" (experts over {context['ep'].size} of these)"
    if run.parallel.sequence_parallel and tp_size > 1:
        layout += ", sequence parallel"
    if pp_size > 1:
        layout += f", {run.parallel.pipeline_schedule} schedule"
    return "\n".join(
        [
            f"model    {num_parameters(run.model):,} parameters{_active(run.model)}",
            f"layout   {context.topology.world_size} ranks = {layout}; ZeRO-{deepspeed.zero_stage}, "
            f"{deepspeed.precision}",
            f"batch    {batch} samples = {dp_size} data-parallel ranks x {num_micro_batches} micro batches x "
            f"{micro}; {batch * run.data.seq_length:,} tokens per step",
            f"device   {torch_device_name(context.device)}, {peak}",
            f"output   {run.output_dir}",
        ]
    )


def _active(model: ModelConfig) -> str:
    return f", {num_active_parameters(model):,} active per token" if model.n_routed_experts else ""


def torch_device_name(device: torch.device) -> str:
    """The GPU's name, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this rank has used: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe_memory(
    run: RunConfig,
    deepspeed: DeepSpeedConfig,
    context: ParallelContext,
    at_start: list[int],
    peaks: list[int],
    optimizer_bytes: int,
) -> str:
    """Measured memory of each rank beside what its share of the model must take.

    at_start: bytes of each rank before the model was made (libraries, data); peaks: the most of each rank;
    optimizer_bytes: of state per parameter.
    """
    state = model_state_bytes_per_rank(
        run.model,
        tp_size=context["tp"].size,
        pp_size=context["pp"].size,
        dp_size=context[DATA_AXES].size,
        zero_stage=deepspeed.zero_stage,
        precision=deepspeed.precision,
        grad_accum_dtype=deepspeed.grad_accum_dtype,
        optimizer_bytes=optimizer_bytes,
    )
    grown = [peak - start for peak, start in zip(peaks, at_start, strict=True)]
    return (
        f"peak memory per rank {_mib(max(peaks))}, {_mib(max(grown))} of it since the model was made; "
        f"in theory {_mib(state.total)} of model state (parameters {_mib(state.parameters)}, gradients "
        f"{_mib(state.gradients)}, optimizer {_mib(state.optimizer)}), the rest is activations and buffers"
    )


def _mib(size_bytes: float) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB"
