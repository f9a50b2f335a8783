"""Where the benchmark of experts finds the time of a step."""

import time
from types import SimpleNamespace

import torch

from benchmarks.experts_benchmark import DISPATCH, OPTIMIZER, PRODUCTS, ROUTER, PartClock
from megalite.config.model import ModelConfig
from megalite.model.moe import MixtureOfExperts
from megalite.parallel import dispatch, grouped
from megalite.parallel.plan import LayerPlan

MODEL = ModelConfig(hidden_size=32, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
WATCHED = [
    (grouped._GroupedLinear, "backward"),
    (dispatch.Dispatch, "__init__"),
    (dispatch._Spread, "forward"),
]


def test_the_clock_times_each_part_in_both_directions_and_leaves_no_trace():
    layer = MixtureOfExperts(MODEL, LayerPlan(), name="mlp")
    engine = SimpleNamespace(module=layer, step=lambda rate: rate)
    clock, before = PartClock(), [getattr(owner, name) for owner, name in WATCHED]
    started = time.process_time()
    seconds = []
    with clock.running(engine):
        out = layer(torch.randn(64, 2, 32, requires_grad=True))
        seconds.append(dict(clock.rounds[0]))
        out.sum().backward()
        seconds.append(dict(clock.rounds[0]))
        assert engine.step(0.5) == 0.5
    whole = time.process_time() - started
    for part in (PRODUCTS, DISPATCH, ROUTER):
        assert 0 < seconds[0][part] < seconds[1][part], part
    assert OPTIMIZER in clock.rounds[0] and sum(clock.rounds[0].values()) < whole
    after = dict(clock.rounds[0])
    layer(torch.randn(64, 2, 32))
    assert clock.rounds == [after] and [getattr(owner, name) for owner, name in WATCHED] == before
