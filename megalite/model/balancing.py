"""Experts kept equally busy: selection biases that move once per optimizer step, by the load of the step.

Counts are of the whole global batch: over micro batches and all ranks that see other tokens, each token once,
padding and evaluation left out. They are integers, and the biases follow from them alone: so they are equal
bit for bit in every layout that routes alike.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist

from megalite.config.balancing import BalancingConfig
from megalite.config.model import ModelConfig
from megalite.model.moe import TopKRouter
from megalite.parallel.context import Group, ParallelContext, group_size
from megalite.parallel.dispatch import counts_of
from megalite.parallel.topology import DATA_AXES

BINS = 1000  # of a histogram that spans 2 and a little more: steps of 0.002


class BalancingRule(Protocol):
    """How a router's bias follows from what its tokens scored.

    num_bins: of the histogram that it needs per expert; 0 where the counts alone decide.
    """

    num_bins: int

    def bins_of(self, scores: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """The bin of each token's score for each expert, int64 [n, E]; scores [n, E], bias [E]."""

    def moved(self, bias: torch.Tensor, counts: torch.Tensor, histogram: torch.Tensor) -> torch.Tensor:
        """The next bias [E], from the tokens of each expert [E] and the histogram [E, num_bins]."""


class NoRule:
    """b stays as it is."""

    num_bins = 0

    def bins_of(self, scores: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("has no bins")

    def moved(self, bias: torch.Tensor, counts: torch.Tensor, histogram: torch.Tensor) -> torch.Tensor:
        return bias


class SignRule(NoRule):
    """b_i += u sign(mean(c) - c_i), c_i the tokens that chose expert i (arXiv 2408.15664, algorithm 1)."""

    def __init__(self, update_rate: float) -> None:
        self.update_rate = update_rate

    def moved(self, bias: torch.Tensor, counts: torch.Tensor, histogram: torch.Tensor) -> torch.Tensor:
        direction = (counts.sum() - counts.numel() * counts).sign()  # in integers: of mean - count
        return bias + self.update_rate * direction.to(bias)


class QuantileRule:
    """b_i such that its share k/E of the tokens would have chosen expert i, what it competes with kept.

        a_t = the (k+1)-th largest of s_t + b      r_ti = a_t - s_ti      b_i = quantile of r_i at k/E

    and the mean taken off (Su 2026, kexue.fm/archives/11619). Quantiles are read from a histogram, linear
    within a bin.
    """

    num_bins = BINS

    def __init__(self, num_choices: int) -> None:
        self.num_choices = num_choices

    def bins_of(self, scores: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        bar = (scores + bias).topk(self.num_choices + 1).values[:, -1:]
        low, width = self._bins(bias)
        return ((bar - scores - low) / width).floor().clamp(0, BINS - 1).long()

    def moved(self, bias: torch.Tensor, counts: torch.Tensor, histogram: torch.Tensor) -> torch.Tensor:
        wanted = histogram.sum(1, keepdim=True).double() * self.num_choices / bias.numel()
        upto = histogram.cumsum(1).double()
        place = (upto < wanted).sum(1, keepdim=True).clamp(max=BINS - 1)
        inside = histogram.gather(1, place).double()
        part = (wanted - upto.gather(1, place) + inside) / inside.clamp(min=1)
        low, width = (x.double() for x in self._bins(bias))
        quantile = low + width * (place + part).squeeze(1)
        return (quantile - quantile.mean()).to(bias.dtype)

    def _bins(self, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the first begins and how wide each is: a score lies between 0 and 1, so r in these."""
        low, high = bias.min() - 1, bias.max() + 1
        return low, (high - low) / BINS


RULES: dict[str, Callable[[BalancingConfig, ModelConfig], BalancingRule]] = {
    "none": lambda balancing, model: NoRule(),
    "sign": lambda balancing, model: SignRule(balancing.update_rate),
    "quantile": lambda balancing, model: QuantileRule(model.num_experts_per_tok),
}


@dataclass(frozen=True)
class ExpertLoad:
    """What the routers of the whole model did in one optimizer step, the same on every rank.

    Attributes:
        tokens: layer -> tokens of the global batch that chose each expert.
        biases: layer -> selection bias of each expert that they were chosen with.
        auxiliary_loss: the balancing loss, mean over samples, summed over layers; 0 without one.
    """

    tokens: dict[int, list[int]]
    biases: dict[int, list[float]]
    auxiliary_loss: float

    @property
    def largest_violation(self) -> float:
        """How far the busiest expert of any layer is above its share: max c / mean c - 1, 0 is balance."""
        return max(max(counts) * len(counts) / max(1, sum(counts)) - 1 for counts in self.tokens.values())

    def as_metrics(self) -> dict[str, float]:
        """Numbers of the step by name."""
        biases = [bias for layer in self.biases.values() for bias in layer]
        named = {
            "expert_largest_violation": self.largest_violation,
            "expert_bias_min": min(biases),
            "expert_bias_max": max(biases),
        }
        return named | ({"auxiliary_loss": self.auxiliary_loss} if self.auxiliary_loss else {})


class ExpertBalancing:
    """Watches the routers of a stage through the micro batches of a step, then moves their biases.

    Args:
        model: which layers have experts.
        routers: those of this stage, by layer.
        rule: how biases move.
        context: the ranks that see other tokens, and the other stages.
    """

    def __init__(
        self,
        model: ModelConfig,
        routers: Mapping[int, TopKRouter],
        rule: BalancingRule,
        context: ParallelContext,
    ) -> None:
        self.model, self.routers, self.rule, self.context = model, routers, rule, context
        self.layers = [layer for layer in range(model.num_hidden_layers) if model.has_experts(layer)]
        shape = (len(routers), model.n_routed_experts, 1 + rule.num_bins)
        self._tally = torch.zeros(shape, dtype=torch.int64, device=context.device)  # counts, then bins
        self._loss = torch.zeros((), dtype=torch.float64, device=context.device)
        for router, tally in zip(routers.values(), self._tally, strict=True):
            router.observer = partial(self._observe, tally, router)

    def begin_step(self, loss_gradient: float) -> None:
        """Count from 0; loss_gradient: of the balancing loss of one sample."""
        self._tally.zero_()
        self._loss.zero_()
        for router in self.routers.values():
            router.loss_gradient = loss_gradient

    def finish_step(self, batch_samples: int, is_taken: bool = True) -> ExpertLoad:
        """Move the biases by what the global batch of so many samples did; collective on all ranks.

        is_taken: whether the step was; else they stay.
        """
        data, stages = self.context[DATA_AXES].group, self.context["pp"].group
        if self.routers:
            _sum_over(data, self._tally)
        _sum_over(data, self._loss)
        _sum_over(stages, self._loss)
        tokens, biases = self._tally[..., 0], [router.bias.clone() for router in self.routers.values()]
        moving = zip(self.routers.values(), self._tally, strict=True) if is_taken else ()
        for router, tally in moving:
            router.bias.copy_(self.rule.moved(router.bias, tally[:, 0], tally[:, 1:]))
        return ExpertLoad(
            self._of_all_layers(list(tokens), torch.int64),
            self._of_all_layers(biases, torch.float32),
            self._loss.item() / batch_samples,
        )

    @torch.no_grad()
    def _observe(
        self,
        tally: torch.Tensor,
        router: TopKRouter,
        scores: torch.Tensor,
        chosen: torch.Tensor,
        padding: torch.Tensor | None,
        loss: torch.Tensor | None,
    ) -> None:
        counted = torch.ones_like(chosen[..., :1]) if padding is None else (~padding).long().unsqueeze(-1)
        num_experts = self.model.n_routed_experts
        tally[:, 0] += counts_of(chosen, num_experts, counted.expand_as(chosen))
        if self.rule.num_bins:
            bins = self.rule.bins_of(scores.flatten(0, -2), router.bias)
            bins += torch.arange(num_experts, device=bins.device) * self.rule.num_bins
            size = num_experts * self.rule.num_bins
            counts = counts_of(bins, size, counted.reshape(-1, 1).expand_as(bins))
            tally[:, 1:] += counts.view(num_experts, -1)
        if loss is not None:
            self._loss += loss

    def _of_all_layers(self, own: list[torch.Tensor], dtype: torch.dtype) -> dict[int, list]:
        """layer -> the numbers of its router, from whichever stage has it."""
        shape = (len(self.layers), self.model.n_routed_experts)
        rows = torch.zeros(shape, dtype=dtype, device=self.context.device)
        for layer, row in zip(self.routers, own, strict=True):
            rows[self.layers.index(layer)] = row
        _sum_over(self.context["pp"].group, rows)
        return dict(zip(self.layers, rows.tolist(), strict=True))


def _sum_over(group: Group, tensor: torch.Tensor) -> None:
    if group_size(group) > 1:
        dist.all_reduce(tensor, group=group)
