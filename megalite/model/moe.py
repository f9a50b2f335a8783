"""Mixture of experts in the place of the MLP (DeepSeekMoE: Dai 2024, arXiv 2401.06066).

Shapes: s sequence, b micro batch, n = s b tokens, h hidden, E routed experts, k chosen of them, t
tensor-parallel ranks. Twin of Hugging Face's Glm4MoeMoE.

Every tensor-parallel rank routes all tokens alike, and holds a slice of each expert's width. So between the
entrance and the exit of the layer outputs, gates' gradients and the router's are parts of a sum over tp.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from megalite.config.model import ModelConfig
from megalite.model.mlp import ParallelMLP
from megalite.model.table import BIAS, expert_names
from megalite.parallel.context import Group
from megalite.parallel.dispatch import Dispatch
from megalite.parallel.grouped import grouped_linear
from megalite.parallel.mappings import (
    copy_to_tp,
    gather_sequence,
    reduce_from_tp,
    scatter_sequence,
    sum_over,
)
from megalite.parallel.plan import LayerPlan
from megalite.parallel.shard import (
    cut_spec,
    describe_shards,
    draw_like_linear,
    register_state,
    sharded_parameter,
    stacked_parameter,
    whole_spec,
)


class Observer(Protocol):
    """Sees what a router decides in training: each token once, however often it is computed."""

    def __call__(
        self,
        scores: torch.Tensor,
        chosen: torch.Tensor,
        padding: torch.Tensor | None,
        loss: torch.Tensor | None,
    ) -> None:
        """scores [s, b, E], chosen experts int64 [s, b, k], padding bool [s, b]: tokens that do not count;
        loss: the balancing loss, summed over samples, where there is one."""


class TopKRouter(nn.Module):
    """Chooses k experts for each token: the largest scores with the bias added; gates are the scores alone.

        s = sigmoid(W x), or softmax(W x)       T = the k largest of s + bias
        g_i = s_i / (sum of s over T + 1e-20) * routed_scaling_factor       for i in T

    all in fp32 (arXiv 2412.19437, equations 13 to 16). The bias is state, moved by balancing.py.

    Attributes:
        observer: is told of every decision in training.
        loss_gradient: of the balancing loss of one sample (see `auxiliary_loss`), on this rank.
    """

    def __init__(self, config: ModelConfig, plan: LayerPlan, *, name: str) -> None:
        super().__init__()
        self.config, self.plan = config, plan
        shape = (config.n_routed_experts, config.hidden_size)
        # Each rank has a part of the gates' gradients, so of the router's.
        spec = whole_spec(plan.context, f"{name}.weight", shape, is_summed=True)
        self.weight = sharded_parameter(spec, plan.init or draw_like_linear, plan.dtype)
        spec = whole_spec(plan.context, f"{name}.{BIAS}", shape[:1], is_summed=False)
        register_state(self, BIAS, spec)
        self.observer: Observer | None = None
        self.loss_gradient = 0.0

    @property
    def bias(self) -> torch.Tensor:
        """The selection bias, fp32 [E]."""
        return getattr(self, BIAS)

    def forward(
        self, x: torch.Tensor, padding: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [s, b, h] -> chosen experts int64 [s, b, k], gates [s, b, k], at least fp32."""
        config, precise = self.config, torch.promote_types(x.dtype, torch.float32)
        weight = self.plan.with_whole_gradient(self.weight)
        logits = F.linear(x.to(precise), weight.to(precise))
        scores = logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(-1)
        chosen = (scores.detach() + self.bias).topk(config.num_experts_per_tok, sorted=False).indices
        if self.training and torch.is_grad_enabled():
            scores = self._in_training(scores, chosen, padding)
        gates = scores.gather(-1, chosen)
        if config.norm_topk_prob:
            gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
        return chosen, gates * config.routed_scaling_factor

    def _in_training(
        self, scores: torch.Tensor, chosen: torch.Tensor, padding: torch.Tensor | None
    ) -> torch.Tensor:
        """The scores, with their balancing loss where there is one; the observer is told."""
        loss, coefficient = None, self.config.router_aux_loss_coef
        if coefficient:
            loss = coefficient * auxiliary_loss(scores, chosen, padding, self.plan.context["cp"].group)
            # On each rank of tp a part, as of all gradients of the scores.
            scores = _WithLoss.apply(scores, loss, self.loss_gradient / self.plan.context["tp"].size)
        if self.observer is not None:
            self.observer(scores.detach(), chosen, padding, None if loss is None else loss.detach())
        return scores

    def extra_repr(self) -> str:
        return describe_shards(self)


def auxiliary_loss(
    scores: torch.Tensor,
    chosen: torch.Tensor,
    padding: torch.Tensor | None = None,
    cp_group: Group = None,
) -> torch.Tensor:
    """The balancing loss of each sample, summed over samples; a scalar.

        L = sum over i of f_i P_i     f_i = E / (k s) * times that i was chosen     P_i = mean of s_i / sum s

    over the tokens of one sample that are no padding (arXiv 2412.19437, equations 17 to 20). Within samples
    and not over a micro batch, so that it is the same in every layout. Where the ranks of cp_group have parts
    of the samples, f is of the whole ones, and P, so the loss, a part of a sum over the ranks.
    """
    num_experts, num_choices = scores.size(-1), chosen.size(-1)
    counted = (
        torch.ones_like(chosen[..., 0], dtype=scores.dtype) if padding is None else (~padding).to(scores)
    )
    length = sum_over(counted.sum(0), cp_group).clamp(min=1).unsqueeze(-1)  # [b, 1]
    hits = torch.zeros_like(scores).scatter_(-1, chosen, 1.0) * counted.unsqueeze(-1)
    shares = sum_over(hits.sum(0), cp_group) * num_experts / (num_choices * length)
    probabilities = scores / scores.sum(-1, keepdim=True) * counted.unsqueeze(-1)
    return (shares * probabilities.sum(0) / length).sum()


class _WithLoss(torch.autograd.Function):
    """The scores as they are; in backward the loss gets its gradient, on whatever stage it is."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, loss: torch.Tensor, gradient: float) -> torch.Tensor:
        ctx.gradient, ctx.like = gradient, loss.detach()
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad, torch.full_like(ctx.like, ctx.gradient), None


class RoutedExperts(nn.Module):
    """All experts of a layer, each x -> down_proj(silu(gate_proj x) * up_proj x), cut over ep and tp.

    Attributes:
        dispatch: how tokens reach their experts.
    """

    dispatch: type[Dispatch] = Dispatch

    def __init__(self, config: ModelConfig, plan: LayerPlan, *, name: str) -> None:
        super().__init__()
        self.plan, self.num_experts = plan, config.n_routed_experts
        width, inner = config.hidden_size, config.moe_intermediate_size
        assert inner is not None
        self.gate_proj = self._stack(f"{name}.gate_proj.weight", inner, width, dim=1)
        self.up_proj = self._stack(f"{name}.up_proj.weight", inner, width, dim=1)
        self.down_proj = self._stack(f"{name}.down_proj.weight", width, inner, dim=2)

    def _stack(self, name: str, out: int, into: int, dim: int) -> nn.Parameter:
        plan, context = self.plan, self.plan.context
        spec = cut_spec(context, name, (self.num_experts, out, into), dim).over_experts(context)
        names = expert_names(name, self.num_experts)
        return stacked_parameter(spec, names, plan.init or draw_like_linear, plan.dtype)

    def forward(self, tokens: torch.Tensor, chosen: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """Tokens [n, h], chosen experts [n, k] and gates [n, k] -> [n, h], a part of the sum over tp."""
        way = self.dispatch(chosen, self.num_experts, self.plan.context["ep"])
        rows = way.spread(tokens)
        gate = grouped_linear(rows, self.gate_proj, way.counts)
        up = grouped_linear(rows, self.up_proj, way.counts)
        gated = self.plan.kernels.expert_gating(gate, up)
        out = way.collect(grouped_linear(gated, self.down_proj, way.counts))
        return (out * gates.unsqueeze(-1)).sum(1).to(tokens.dtype)

    def extra_repr(self) -> str:
        return describe_shards(self)


class MixtureOfExperts(nn.Module):
    """y = sum over the chosen experts of gate * expert(x), plus the shared experts' MLP(x)."""

    def __init__(self, config: ModelConfig, plan: LayerPlan, *, name: str) -> None:
        super().__init__()
        self.plan = plan
        self.enter = gather_sequence if plan.sequence_parallel else copy_to_tp
        self.leave = scatter_sequence if plan.sequence_parallel else reduce_from_tp
        self.gate = TopKRouter(config, plan, name=f"{name}.gate")
        self.experts = RoutedExperts(config, plan, name=f"{name}.experts")
        shared, width = f"{name}.shared_experts", config.shared_intermediate_size
        self.shared_experts = (
            ParallelMLP(config, plan, name=shared, intermediate_size=width) if width else None
        )

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        """x [s, b, h] (or [s/t, b, h] under sequence parallelism), the shape kept; padding bool [s, b]."""
        whole = self.enter(x, self.plan.tp_group)
        chosen, gates = self.gate(whole, padding)
        routed = self.experts(*(tensor.flatten(0, 1) for tensor in (whole, chosen, gates)))
        routed = self.leave(routed.view_as(whole), self.plan.tp_group)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)


def routers_of(module: nn.Module) -> list[TopKRouter]:
    """The routers in a module, in the order of its layers."""
    return [part for part in module.modules() if isinstance(part, TopKRouter)]


@contextmanager
def unobserved(module: nn.Module) -> Iterator[None]:
    """Compute again what was observed before: routers tell nobody."""
    observers = [(router, router.observer) for router in routers_of(module)]
    for router, _ in observers:
        router.observer = None
    try:
        yield
    finally:
        for router, observer in observers:
            router.observer = observer
