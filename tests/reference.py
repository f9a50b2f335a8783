"""The run that every layout must give: transformers' model in one process, and AdamW written out.

A Llama, a Qwen3, or a Glm4Moe with the balancing of its experts written out.

Nothing of megalite computes here. Its own model only lends the initial weights, under Hugging Face's names.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megalite.batch import Batch
from megalite.config.model import ModelConfig
from megalite.model.llama import LlamaStage

BIAS = "e_score_correction_bias"
LEARNING_RATE, BETA1, BETA2, EPSILON, WEIGHT_DECAY, CLIP = 3e-3, 0.8, 0.93, 1e-7, 0.3, 0.5


@dataclass
class Curve:
    """What a run gave: loss and gradient norm of each step, and the first step's gradients, not clipped.

    tokens, biases: of each step, layer -> of each expert, where there are any; biases as tokens met them.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: list[dict[int, list[int]]] = field(default_factory=list)
    biases: list[dict[int, list[float]]] = field(default_factory=list)


def learning_rate_of(step: int) -> float:
    """Another rate in each step (from 0), so that one of another step is noticed."""
    return LEARNING_RATE * (1 + step % 3)


def transformers_model(model: ModelConfig, seed: int) -> nn.Module:
    """transformers' model with the initial weights of ours."""
    fields = model.model_dump(exclude={"rope_scaling", "rope_theta"})
    rope = {"rope_type": "default", "rope_theta": model.rope_theta}
    fields |= {"rope_parameters": rope, "attn_implementation": "eager"}
    if model.n_routed_experts:
        rope["partial_rotary_factor"] = 1.0
        config = Glm4MoeConfig(**fields)
        config._experts_implementation = "eager"
        theirs = Glm4MoeForCausalLM(config)
    elif model.use_qk_norm:
        theirs = Qwen3ForCausalLM(Qwen3Config(**fields))
    else:
        theirs = LlamaForCausalLM(LlamaConfig(**fields))
    weights = {
        p.spec.name: p.detach()[: p.spec.box_shape[0]] for p in LlamaStage(model, seed=seed).parameters()
    }
    missing, unexpected = theirs.load_state_dict(_under_their_names(weights), strict=False)
    assert not unexpected
    assert all(name == "lm_head.weight" or name.endswith(BIAS) for name in missing)
    theirs.tie_weights()
    return theirs


def _under_their_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Their experts have gate and up in one."""
    theirs = {name: w for name, w in weights.items() if ".experts." not in name}
    for name, gate in weights.items():
        if name.endswith(".experts.gate_proj.weight"):
            layer = name.removesuffix(".gate_proj.weight")
            theirs[f"{layer}.gate_up_proj"] = torch.cat([gate, weights[f"{layer}.up_proj.weight"]], dim=1)
            theirs[f"{layer}.down_proj"] = weights[f"{layer}.down_proj.weight"]
    return theirs


def under_our_names(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse."""
    ours = {}
    for name, tensor in theirs.items():
        if name.endswith(".gate_up_proj"):
            layer = name.removesuffix(".gate_up_proj")
            gate, up = tensor.chunk(2, dim=1)
            ours |= {f"{layer}.gate_proj.weight": gate, f"{layer}.up_proj.weight": up}
        else:
            ours[f"{name}.weight" if name.endswith(".experts.down_proj") else name] = tensor
    return ours


class Routers:
    """Listens to the routers of transformers' model; their biases and the balancing loss, written out.

    precise: compute in the weights' format, where transformers' router always computes in fp32.
    """

    def __init__(self, theirs: nn.Module, model: ModelConfig, precise: bool = False) -> None:
        self.model = model
        self.gates = {
            i: layer.mlp.gate for i, layer in enumerate(theirs.model.layers) if hasattr(layer.mlp, "gate")
        }
        self.seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # logits and chosen experts
        for i, gate in self.gates.items():
            if precise or model.scoring_func == "softmax":
                gate.forward = partial(self._route, gate)
            gate.register_forward_hook(lambda _, args, out, i=i: self.seen.update({i: (out[0], out[2])}))

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.softmax(-1) if self.model.scoring_func == "softmax" else 1 / (1 + (-logits).exp())

    def _route(self, gate: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = x.reshape(-1, x.size(-1)) @ gate.weight.T
        scores = self._scores(logits)
        order = (scores + gate.e_score_correction_bias).sort(dim=-1, descending=True).indices
        chosen = order[:, : self.model.num_experts_per_tok]
        gates = scores.gather(1, chosen)
        if self.model.norm_topk_prob:
            gates = gates / gates.sum(-1, keepdim=True)
        return logits, gates * self.model.routed_scaling_factor, chosen

    def balancing_loss(self, batch: Batch) -> torch.Tensor | float:
        """Per layer E sum_i (share of choices that are i) (mean share of scores of i), mean over samples."""
        total, experts, shape = 0.0, self.model.n_routed_experts, batch.input_ids.shape
        for logits, chosen in self.seen.values():
            for sample, places in enumerate(_real_tokens(batch)):
                scores = self._scores(logits.view(*shape, -1)[sample, places])
                times = chosen.view(*shape, -1)[sample, places].flatten().bincount(minlength=experts)
                shares = (scores / scores.sum(-1, keepdim=True)).mean(0)
                total = total + experts * (times.to(shares) / times.sum() * shares).sum()
        return self.model.router_aux_loss_coef * total / len(batch.input_ids)

    def tokens(self, batch: Batch) -> dict[int, list[int]]:
        """Of each layer, the real tokens that chose each expert."""
        found = {}
        for i, (_, chosen) in self.seen.items():
            of_samples = chosen.view(*batch.input_ids.shape, -1)
            real = torch.cat([of_samples[k, places] for k, places in enumerate(_real_tokens(batch))])
            found[i] = [int((real == expert).sum()) for expert in range(self.model.n_routed_experts)]
        return found

    def biases(self) -> dict[int, list[float]]:
        return {i: gate.e_score_correction_bias.tolist() for i, gate in self.gates.items()}

    def move(self, tokens: dict[int, list[int]], rate: float) -> None:
        """Wang 2024, arXiv 2408.15664, algorithm 1."""
        for i, gate in self.gates.items():
            mean = sum(tokens[i]) / len(tokens[i])
            for expert, count in enumerate(tokens[i]):
                gate.e_score_correction_bias[expert] += rate * ((mean > count) - (mean < count))


def _real_tokens(batch: Batch) -> list[torch.Tensor]:
    """Of each sample, the places that are no padding."""
    if batch.padding is None:
        return list(torch.ones_like(batch.input_ids, dtype=torch.bool))
    return list(~batch.padding)


def mean_loss(llama: nn.Module, batch: Batch) -> torch.Tensor:
    """Sum of weight times loss over the labels that are not -100, over the sum of their weights."""
    logits = llama(batch.input_ids, **within_documents(batch)).logits
    losses = F.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="none"
    )
    weights = torch.ones(batch.labels.shape) if batch.loss_weights is None else batch.loss_weights
    weights = weights.masked_fill(batch.labels == -100, 0).flatten()
    return (losses * weights).sum() / weights.sum()


def within_documents(batch: Batch) -> dict[str, torch.Tensor]:
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


def reference_curve(
    model: ModelConfig, batches: list[Batch], seed: int, rate: float = 1.0, bias_rate: float = 0.0
) -> Curve:
    """From the initial weights of ours."""
    return train_reference(transformers_model(model, seed), model, batches, rate, bias_rate)


def train_reference(
    llama: nn.Module, model: ModelConfig, batches: list[Batch], rate: float = 1.0, bias_rate: float = 0.0
) -> Curve:
    """One process, the whole global batch at once, at `rate` times the learning rates."""
    curve = Curve()
    routers = Routers(llama, model)
    optimizer = WrittenOutAdamW(llama.parameters())
    for step, batch in enumerate(batches):
        loss = mean_loss(llama, batch)
        (loss + routers.balancing_loss(batch)).backward()
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in llama.named_parameters()}
            curve.gradients = under_our_names(gradients)
        if routers.gates:
            curve.tokens.append(routers.tokens(batch))
            curve.biases.append(routers.biases())
            routers.move(curve.tokens[-1], bias_rate)
        norm = sum(p.grad.double().square().sum() for p in llama.parameters()).sqrt().item()
        optimizer.step(rate * learning_rate_of(step), min(1.0, CLIP / (norm + 1e-6)))
        curve.losses.append(loss.item())
        curve.norms.append(norm)
    return curve


def assert_same_numbers(name: str, got: list[float], want: list[float], last_step: int | None = None) -> None:
    """Relative differences within 1e-5 at the first step, growing to 1e-4 at the last, or at `last_step`."""
    actual, wanted = torch.tensor(got), torch.tensor(want)
    relative = ((actual - wanted) / wanted).abs()
    allowed = torch.linspace(1e-5, 1e-4, last_step or len(want))[: len(want)]
    for step in torch.nonzero(~(relative < allowed)).flatten().tolist():
        raise AssertionError(f"{name} of step {step}: {got[step]} for {want[step]}")
