"""The run that every layout must give: transformers' Llama in one process, and AdamW written out.

Nothing of megalite computes here. Its own model only lends the initial weights, under Hugging Face's names.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from megalite.batch import Batch
from megalite.config.model import ModelConfig
from megalite.model.llama import LlamaStage

LEARNING_RATE, BETA1, BETA2, EPSILON, WEIGHT_DECAY, CLIP = 3e-3, 0.8, 0.93, 1e-7, 0.3, 0.5


@dataclass
class Curve:
    """What a run gave: loss and gradient norm of each step, and the first step's gradients, not clipped."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)


def learning_rate_of(step: int) -> float:
    """Another rate in each step (from 0), so that one of another step is noticed."""
    return LEARNING_RATE * (1 + step % 3)


def transformers_llama(model: ModelConfig, seed: int) -> LlamaForCausalLM:
    """transformers' model with the initial weights of ours."""
    fields = model.model_dump(exclude={"rope_scaling", "rope_theta"})
    rope = {"rope_type": "default", "rope_theta": model.rope_theta}
    llama = LlamaForCausalLM(LlamaConfig(**fields, rope_parameters=rope, attn_implementation="eager"))
    weights = {
        p.spec.name: p.detach()[: p.spec.box_shape[0]] for p in LlamaStage(model, seed=seed).parameters()
    }
    missing, unexpected = llama.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    llama.tie_weights()
    return llama


def mean_loss(llama: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Sum of weight times loss over the labels that are not -100, over the sum of their weights."""
    logits = llama(batch.input_ids, **_within_documents(batch)).logits
    losses = F.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="none"
    )
    weights = torch.ones(batch.labels.shape) if batch.loss_weights is None else batch.loss_weights
    weights = weights.masked_fill(batch.labels == -100, 0).flatten()
    return (losses * weights).sum() / weights.sum()


def _within_documents(batch: Batch) -> dict[str, torch.Tensor]:
    """Mask [b, 1, s, s] and positions [b, s] of samples that hold several documents."""
    starts = batch.document_starts
    if starts is None:
        return {}
    place = torch.arange(starts.size(1))
    seen = (place <= place.unsqueeze(1)) & (place >= starts.unsqueeze(2))
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min).unsqueeze(1)
    return {"attention_mask": mask, "position_ids": place - starts}


class WrittenOutAdamW:
    """Loshchilov 2017, algorithm 2; decay on matrices alone. Steps count from 1."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.means = [torch.zeros_like(p) for p in self.parameters]
        self.squares = [torch.zeros_like(p) for p in self.parameters]
        self.step_number = 0

    @torch.no_grad()
    def step(self, learning_rate: float, scale: float) -> None:
        """Use gradients times `scale`."""
        self.step_number += 1
        for p, mean, square in zip(self.parameters, self.means, self.squares, strict=True):
            gradient = p.grad * scale
            mean += (1 - BETA1) * (gradient - mean)
            square += (1 - BETA2) * (gradient * gradient - square)
            unbiased_mean = mean / (1 - BETA1**self.step_number)
            unbiased_square = square / (1 - BETA2**self.step_number)
            if p.dim() > 1:
                p *= 1 - learning_rate * WEIGHT_DECAY
            p -= learning_rate * unbiased_mean / (unbiased_square.sqrt() + EPSILON)
            p.grad = None


def reference_curve(model: ModelConfig, batches: list[Batch], seed: int, rate: float = 1.0) -> Curve:
    """One process, the whole global batch at once, at `rate` times the learning rates."""
    curve = Curve()
    llama = transformers_llama(model, seed)
    optimizer = WrittenOutAdamW(llama.parameters())
    for step, batch in enumerate(batches):
        loss = mean_loss(llama, batch)
        loss.backward()
        if step == 0:
            curve.gradients = {name: p.grad.clone() for name, p in llama.named_parameters()}
        norm = sum(p.grad.double().square().sum() for p in llama.parameters()).sqrt().item()
        optimizer.step(rate * learning_rate_of(step), min(1.0, CLIP / (norm + 1e-6)))
        curve.losses.append(loss.item())
        curve.norms.append(norm)
    return curve
