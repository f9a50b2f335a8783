"""What a run says of itself at its start and its end."""

import torch

from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.model import ModelConfig
from megalite.config.run import RunConfig
from megalite.model.flops import (
    num_active_parameters,
    num_adapter_parameters,
    num_parameters,
)
from megalite.parallel.context import ParallelContext


def describe_run(run: RunConfig, deepspeed: DeepSpeedConfig, context: ParallelContext, peak: str) -> str:
    """The derived numbers that a person checks before a run is left alone."""
    batch, micro = deepspeed.train_batch_size, deepspeed.train_micro_batch_size_per_gpu
    tp_size, pp_size, cp_size, dp_size = (context[axis].size for axis in ("tp", "pp", "cp", "dp"))
    num_micro_batches = deepspeed.num_micro_batches(dp_size)
    sequence = f" x context {cp_size}" if cp_size > 1 else ""
    layout = f"tensor {tp_size} x pipeline {pp_size}{sequence} x data {dp_size}"
    if context["ep"].size > 1:
        layout += f" (experts over {context['ep'].size} of these)"
    if run.parallel.sequence_parallel and tp_size > 1:
        layout += ", sequence parallel"
    if cp_size > 1:
        layout += f", context attention by {run.parallel.context_attention}"
    if pp_size > 1:
        layout += f", {run.parallel.pipeline_schedule} schedule"
    return "\n".join(
        [
            f"model    {num_parameters(run.model):,} parameters{_active(run.model)}{_adapters(run)}",
            f"layout   {context.topology.world_size} ranks = {layout}; ZeRO-{deepspeed.zero_stage}, "
            f"{deepspeed.precision}",
            f"batch    {batch} samples = {dp_size} data-parallel ranks x {num_micro_batches} micro batches x "
            f"{micro}; {batch * run.tokens_per_sample:,} tokens per step",
            f"device   {torch_device_name(context.device)}, {peak}",
            f"output   {run.output_dir}",
        ]
    )


def _active(model: ModelConfig) -> str:
    return f", {num_active_parameters(model):,} active per token" if model.n_routed_experts else ""


def _adapters(run: RunConfig) -> str:
    if not run.lora.rank:
        return ""
    trained = num_adapter_parameters(run.model, run.lora)
    return f", frozen; {trained:,} more in adapters of rank {run.lora.rank} are trained"


def torch_device_name(device: torch.device) -> str:
    """The GPU's name, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
