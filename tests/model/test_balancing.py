"""The rules that move selection biases, and that they balance: on skewed data within 200 steps."""

import numpy as np
import pytest
import torch

from megalite.config.balancing import BalancingConfig
from megalite.config.model import ModelConfig
from megalite.model.balancing import BINS, RULES, ExpertBalancing, ExpertLoad, QuantileRule, SignRule
from megalite.model.moe import TopKRouter
from megalite.parallel.context import ParallelContext
from megalite.parallel.plan import LayerPlan
from megalite.parallel.shard import normal_initializer

E, K, SAMPLES, NUM_TOKENS = 8, 2, 64, 32768
MODEL = ModelConfig(
    hidden_size=32, n_routed_experts=E, num_experts_per_tok=K, moe_intermediate_size=8, num_hidden_layers=1
)


# The rules.


def test_the_sign_rule_moves_every_bias_by_a_step_towards_the_mean():
    bias, counts = torch.zeros(4), torch.tensor([10, 30, 20, 20])  # mean 20
    moved = SignRule(0.25).moved(bias, counts, torch.empty(4, 0))
    assert moved.tolist() == [0.25, -0.25, 0.0, 0.0]


def test_the_sign_rule_compares_in_integers_where_floats_would_be_rounded():
    """Counts that fp32 cannot tell apart: 2^24 and 2^24 + 1."""
    counts = torch.tensor([2**24, 2**24 + 1, 2**24 + 2])
    assert SignRule(1.0).moved(torch.zeros(3), counts, torch.empty(3, 0)).tolist() == [1.0, 0.0, -1.0]


def histogram_of(rule, scores, bias):
    bins = rule.bins_of(scores, bias)
    return torch.stack([torch.bincount(bins[:, i], minlength=BINS) for i in range(bias.numel())])


@pytest.mark.parametrize("start", [torch.zeros(E), torch.linspace(-0.2, 0.3, E)], ids=["zero", "moved"])
def test_the_quantile_rule_gives_the_quantile_within_a_bin(start):
    scores = torch.rand(5000, E, generator=torch.Generator().manual_seed(0)) ** torch.linspace(0.5, 2, E)
    rule = QuantileRule(K)
    moved = rule.moved(start, torch.zeros(E), histogram_of(rule, scores, start))
    bar = (scores + start).sort(dim=1, descending=True).values[:, K : K + 1].numpy()
    exact = np.quantile(bar - scores.numpy(), K / E, axis=0)
    bin_width = (2 + (start.max() - start.min()).item()) / BINS
    np.testing.assert_allclose(moved.numpy(), exact - exact.mean(), atol=bin_width)


def test_the_quantile_rule_would_have_given_each_expert_its_share():
    """With the bar of each token kept, as the rule assumes; the expert at the bar itself is let in or not."""
    scores = torch.rand(20000, E, generator=torch.Generator().manual_seed(1)) ** torch.linspace(0.5, 2, E)
    rule, bias = QuantileRule(K), torch.zeros(E)
    moved = rule.moved(bias, torch.zeros(E), histogram_of(rule, scores, bias)).double()
    missing = scores.sort(dim=1, descending=True).values[:, K : K + 1] - scores
    moved += np.quantile(missing.numpy(), K / E, axis=0).mean()
    bin_width = 2 / BINS
    assert ((missing < moved - bin_width).double().mean(0) <= K / E).all()
    assert ((missing < moved + bin_width).double().mean(0) >= K / E).all()


def test_violation_is_how_far_the_busiest_expert_is_above_its_share():
    load = ExpertLoad({1: [20, 20], 2: [30, 10]}, {1: [0.0, 0.0], 2: [-0.5, 0.25]}, 0.0)
    assert load.largest_violation == 0.5
    assert load.as_metrics() == {
        "expert_largest_violation": 0.5,
        "expert_bias_min": -0.5,
        "expert_bias_max": 0.25,
    }


# That they balance.


class SkewedTokens:
    """Activations around a few centres of unlike frequency, as words are, which differ by context."""

    def __init__(self, hidden_size):
        generator = torch.Generator().manual_seed(1)
        self.centres = torch.randn(16, hidden_size, generator=generator)
        self.weights = 1 / torch.arange(1, 17)

    def batch(self, step):
        """[s, b, h]"""
        generator = torch.Generator().manual_seed(step)
        words = torch.multinomial(self.weights, NUM_TOKENS, replacement=True, generator=generator)
        noise = torch.randn(NUM_TOKENS, self.centres.size(1), generator=generator)
        return (self.centres[words] + noise).view(NUM_TOKENS // SAMPLES, SAMPLES, -1)


def violations(rule, num_steps=200):
    """The largest violation of each step of one router; the tokens are other ones each time."""
    router = TopKRouter(MODEL, LayerPlan(init=normal_initializer(seed=5, std=0.05)), name="gate")
    balancing = BalancingConfig(rule=rule)
    experts = ExpertBalancing(MODEL, {0: router}, RULES[rule](balancing, MODEL), ParallelContext())
    tokens, found = SkewedTokens(MODEL.hidden_size), []
    for step in range(num_steps):
        experts.begin_step(0.0)
        router(tokens.batch(step))
        found.append(experts.finish_step(SAMPLES).largest_violation)
    return found


@pytest.mark.parametrize("rule", ["sign", "quantile"])
def test_the_largest_violation_falls_under_five_percent_within_200_steps(rule):
    """32,768 tokens, 8,192 per expert: chance alone makes 1 % (one standard deviation)."""
    found = violations(rule)
    assert found[0] > 0.5
    assert max(found[-20:]) < 0.05


def test_control_without_a_rule_it_does_not():
    assert min(violations("none")) > 0.5
