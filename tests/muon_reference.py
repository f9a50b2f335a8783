"""Muon written out from its equations, matrix by matrix in one process; nothing of megalite computes here."""

import torch
from torch import nn

from megalite.batch import Batch
from megalite.config.model import ModelConfig
from tests.reference import (
    BETA1,
    BETA2,
    CLIP,
    EPSILON,
    WEIGHT_DECAY,
    Curve,
    Routers,
    learning_rate_of,
    mean_loss,
    transformers_model,
    under_our_names,
)
from tests.trainers import BIAS_RATE

MOMENTUM, RATE_FACTOR, CLASSIC = 0.9, 0.5, (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 4


class WrittenOutMuon:
    """Jordan 2024 with the scale of Liu 2025 (arXiv 2502.16982, equation 4); AdamW for the rest."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = dict(model.named_parameters())
        self.momenta = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.squares = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.step_number = 0

    @torch.no_grad()
    def step(self, rate: float, scale: float) -> None:
        """Use gradients times `scale`."""
        self.step_number += 1
        for name, p in self.parameters.items():
            gradient = p.grad * scale
            if p.dim() == 1 or name.split(".")[-2] in ("embed_tokens", "lm_head", "gate"):
                self._adamw(name, p, gradient, rate * RATE_FACTOR)
            else:
                self._muon(name, p, gradient, rate)
            p.grad = None

    def _muon(self, name: str, p: nn.Parameter, gradient: torch.Tensor, rate: float) -> None:
        mean = self.momenta[name]
        mean += (1 - MOMENTUM) * (gradient - mean)
        update = (1 - MOMENTUM) * gradient + MOMENTUM * mean
        for matrix, its_update in matrices(name, p, update):
            size = max(matrix.shape)
            matrix *= 1 - rate * WEIGHT_DECAY
            matrix -= rate * 0.2 * size**0.5 * newton_schulz(its_update)

    def _adamw(self, name: str, p: nn.Parameter, gradient: torch.Tensor, rate: float) -> None:
        mean, square = self.momenta[name], self.squares[name]
        mean += (1 - BETA1) * (gradient - mean)
        square += (1 - BETA2) * (gradient * gradient - square)
        unbiased_mean = mean / (1 - BETA1**self.step_number)
        unbiased_square = square / (1 - BETA2**self.step_number)
        if p.dim() > 1:
            p *= 1 - rate * WEIGHT_DECAY
        p -= rate * unbiased_mean / (unbiased_square.sqrt() + EPSILON)


def matrices(name: str, p: torch.Tensor, update: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Views of each matrix in a parameter of transformers: each expert's, gate and up each their own."""
    if p.dim() == 2:
        return [(p, update)]
    pairs = list(zip(p, update, strict=True))
    if not name.endswith("gate_up_proj"):
        return pairs
    halves = [list(zip(w.chunk(2), u.chunk(2), strict=True)) for w, u in pairs]
    return [pair for both in halves for pair in both]


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    x = matrix.T if matrix.size(0) > matrix.size(1) else matrix
    x = x / (x.square().sum().sqrt() + 1e-7)
    a, b, c = CLASSIC
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.size(0) > matrix.size(1) else x


class WrittenOutQkClip:
    """Kimi K2 (arXiv 2507.20534, algorithm 1), on the queries alone: each head's times min(1, tau / max)."""

    def __init__(self, model: nn.Module, tau: float) -> None:
        self.tau, self.layers = tau, [layer.self_attn for layer in model.model.layers]
        self.largest: list[torch.Tensor] = []
        self.num_clipped = 0
        self.num_heads = sum(attention.config.num_attention_heads for attention in self.layers)
        for attention in self.layers:
            attention.register_forward_pre_hook(self._see, with_kwargs=True)

    @torch.no_grad()
    def _see(self, attention: nn.Module, args: tuple, kwargs: dict) -> None:
        x, size = kwargs["hidden_states"], attention.head_dim
        cos, sin = (table.unsqueeze(1) for table in kwargs["position_embeddings"])
        query, key = (
            proj(x).unflatten(-1, (-1, size)).transpose(1, 2) for proj in (attention.q_proj, attention.k_proj)
        )
        query, key = (
            h * cos + torch.cat([-h[..., size // 2 :], h[..., : size // 2]], dim=-1) * sin
            for h in (query, key)
        )
        key = key.repeat_interleave(query.size(1) // key.size(1), dim=1)
        logits = query @ key.transpose(2, 3) / size**0.5
        hidden = kwargs["attention_mask"] < 0
        self.largest.append(logits.masked_fill(hidden, -torch.inf).amax(dim=(0, 2, 3)))

    @torch.no_grad()
    def step(self) -> None:
        for attention, largest in zip(self.layers, self.largest, strict=True):
            heads = attention.q_proj.weight.view(len(largest), -1)
            for head, logit in enumerate(largest):
                if logit > self.tau:
                    heads[head] *= self.tau / logit
                    self.num_clipped += 1
        self.largest.clear()


def train_muon(
    model: ModelConfig, batches: list[Batch], seed: int, rate: float = 1.0, tau: float | None = None
) -> tuple[Curve, dict[str, torch.Tensor]]:
    """From the initial weights of ours, the whole global batch at once: its curve, and its last weights.

    rate: factor of the learning rates. tau: for QK-clip, which must have something to do.
    """
    theirs = transformers_model(model, seed)
    clip = WrittenOutQkClip(theirs, tau) if tau is not None else None
    curve, routers, optimizer = Curve(), Routers(theirs, model), WrittenOutMuon(theirs)
    for step, batch in enumerate(batches):
        loss = mean_loss(theirs, batch)
        (loss + routers.balancing_loss(batch)).backward()
        if routers.gates:
            routers.move(routers.tokens(batch), BIAS_RATE)
        norm = sum(p.grad.double().square().sum() for p in theirs.parameters()).sqrt().item()
        optimizer.step(rate * learning_rate_of(step), min(1.0, CLIP / (norm + 1e-6)))
        if clip:
            clip.step()
        curve.losses.append(loss.item())
        curve.norms.append(norm)
    assert clip is None or 0 < clip.num_clipped < len(batches) * clip.num_heads
    weights = {name: p.detach() for name, p in theirs.named_parameters()}
    return curve, under_our_names(weights)
