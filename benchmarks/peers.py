"""The same step elsewhere: transformers' Llama in a plain loop, in DDP, or in DeepSpeed's engine."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from megalite.batch import Batch
from megalite.checkpoint.hf_config import hf_config
from megalite.config.optimizer import OptimizerConfig
from megalite.config.run import RunConfig
from megalite.training.precision import TORCH_DTYPES

Step = Callable[[], float]


def transformers_model(run: RunConfig, precision: str, device: torch.device, *, compiled: bool) -> nn.Module:
    """Random, with torch's attention kernel, weights in the run's number format."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    facts: dict[str, Any] = {**hf_config(run.model, "float32"), "attn_implementation": "sdpa"}
    model: Any = LlamaForCausalLM(LlamaConfig(**facts))
    model = model.to(device, TORCH_DTYPES[precision]).train()
    model.config.use_cache = False
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    return model


def plain_step(
    run: RunConfig,
    precision: str,
    batches: Sequence[Batch],
    clip: float,
    *,
    replicated: bool = False,
    compiled: bool = False,
) -> Step:
    """One process, or with `replicated` DDP over all; fused AdamW and clipping."""
    device = _device_of(batches)
    model = transformers_model(run, precision, device, compiled=compiled)
    wrapped = DistributedDataParallel(model) if replicated else model
    optimizer = adamw(model, run.optimizer)

    def step() -> float:
        total = torch.zeros((), device=device)
        for number, batch in enumerate(batches):
            if isinstance(wrapped, DistributedDataParallel):
                wrapped.require_backward_grad_sync = number == len(batches) - 1
            loss = token_loss(wrapped(batch.input_ids).logits, batch) / len(batches)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return step


def deepspeed_step(
    run: RunConfig, raw: dict[str, Any], batches: Sequence[Batch], *, compiled: bool = False
) -> Step:
    """transformers' model in DeepSpeed's own engine, which is given what ours is given."""
    import deepspeed

    precision = "bf16" if "bf16" in raw else "fp32"
    device = _device_of(batches)
    model = transformers_model(run, precision, device, compiled=compiled)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw(model, run.optimizer), config=dict(raw))

    def step() -> float:
        total = torch.zeros((), device=device)
        for batch in batches:
            loss = token_loss(engine(batch.input_ids).logits, batch)
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        return float(total) / len(batches)

    return step


def token_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean over the labels; logits [b, s, vocabulary]."""
    assert batch.labels is not None
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten())


def adamw(model: nn.Module, options: OptimizerConfig) -> torch.optim.Optimizer:
    """Fused, with weight decay for matrices alone."""
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == flag] for flag in (True, False))
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": options.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        eps=options.epsilon,
        fused=True,
    )


def _device_of(batches: Sequence[Batch]) -> torch.device:
    assert batches[0].input_ids is not None
    return batches[0].input_ids.device
