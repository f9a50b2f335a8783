"""Experts in float64: outputs, gradients, counts and biases of transformers' Glm4Moe, whatever the layout.

In float64 the layouts' sums differ by some 1e-16, so that no tie between two experts can be decided by
rounding: what is chosen, counted and moved must be equal. Here without DeepSpeed, with plain gradient
descent; tests/test_equivalence.py does the same with it, in fp32.
"""

import traceback
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRMSNorm

from megalite.config.balancing import BalancingConfig
from megalite.config.model import ModelConfig
from megalite.model import balancing, llama
from megalite.model.balancing import RULES, ExpertBalancing
from megalite.model.llama import LlamaStage
from megalite.model.moe import MixtureOfExperts, TopKRouter, auxiliary_loss
from megalite.parallel.context import ParallelContext
from megalite.parallel.grouped import grouped_linear, has_kernel
from megalite.parallel.plan import LayerPlan
from megalite.parallel.shard import spec_of
from megalite.parallel.topology import DATA_AXES, Topology
from tests.harness import run_distributed
from tests.reference import Routers, mean_loss, transformers_model, under_our_names
from tests.trainers import BATCH, EXPERTS, SEED, SOFTMAX, global_batch

NUM_STEPS, LEARNING_RATE, BIAS_RATE = 5, 0.5, 0.02
CLOSE = {"rtol": 1e-9, "atol": 1e-12}  # float64 sums of some thousand terms, over five steps


@dataclass(frozen=True)
class Layout:
    tp: int = 1
    ep: int = 1
    sp: bool = True
    recompute: str = "none"
    model_kind: str = "experts"
    rule: str = "sign"
    fault: str = ""

    @property
    def reference(self) -> str:
        """What it must equal."""
        return self.model_kind if self.rule == "sign" else self.rule

    @property
    def model(self) -> ModelConfig:
        return {"experts": EXPERTS, "softmax": SOFTMAX}[self.model_kind]


LAYOUTS = [
    Layout(recompute="full"),
    Layout(tp=2, ep=2, recompute="full"),
    Layout(tp=2, sp=False),
    Layout(tp=4, recompute="full"),
    Layout(ep=2),
    Layout(ep=4),
    Layout(tp=2, ep=2, model_kind="softmax"),
    Layout(ep=4, recompute="full", model_kind="softmax"),
]
# The quantile rule is compared with its definition in test_balancing.py, here one layout with others.
QUANTILES = Layout(rule="quantile")
LIKE_QUANTILES = [
    replace(QUANTILES, tp=2, ep=2, recompute="full"),
    replace(QUANTILES, tp=4),
    replace(QUANTILES, ep=4),
]


@dataclass
class Result:
    """Of each step the loss, the tokens of each expert, and the biases; of the last all gradients."""

    losses: list[float]
    tokens: list[dict[int, list[int]]]
    biases: list[dict[int, list[float]]]
    gradients: dict[str, torch.Tensor]


def batch_of(step):
    return global_batch(step, padded=True, documents=step % 2 == 1)


def reference(model: ModelConfig) -> Result:
    theirs = transformers_model(model, SEED).double()
    for norm in (module for module in theirs.modules() if isinstance(module, Glm4MoeRMSNorm)):
        norm.forward = partial(_norm_in_float64, norm)
    routers = Routers(theirs, model, precise=True)
    for gate in routers.gates.values():
        gate.e_score_correction_bias = gate.e_score_correction_bias.float()
    result = Result([], [], [], {})
    for step in range(NUM_STEPS):
        batch = batch_of(step)
        theirs.zero_grad()
        with patch.object(F, "softmax", _softmax_in_float64):
            loss = mean_loss(theirs, batch)
        (loss + routers.balancing_loss(batch)).backward()
        result.losses.append(loss.item())
        result.tokens.append(routers.tokens(batch))
        result.biases.append(routers.biases())
        routers.move(result.tokens[-1], BIAS_RATE)
        result.gradients = under_our_names({name: p.grad for name, p in theirs.named_parameters()})
        with torch.no_grad():
            for p in theirs.parameters():
                p -= LEARNING_RATE * p.grad
    return result


def _norm_in_float64(norm, x):
    return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def _softmax_in_float64(x, dim, dtype=None):
    return x.softmax(dim)


def run_layout(rank: int, layout: Layout) -> Result:
    topology = Topology(4, tp_size=layout.tp, ep_size=layout.ep, kv_copy_size=max(1, layout.tp // 2))
    context = ParallelContext.build(topology, rank, torch.device("cpu"))
    plan = LayerPlan(context, layout.sp and layout.tp > 1, dtype=torch.float64)
    stage = LlamaStage(layout.model, plan, seed=SEED, recompute=layout.recompute)
    rule = RULES[layout.rule](BalancingConfig(update_rate=BIAS_RATE), layout.model)
    experts = ExpertBalancing(layout.model, stage.routers(), rule, context)
    result = Result([], [], [], {})
    for step in range(NUM_STEPS):
        whole = batch_of(step)
        experts.begin_step(loss_gradient=1 / BATCH)
        stage.zero_grad()
        loss = torch.zeros(())
        for micro_batch in whole.split(context["dp"].size)[context["dp"].rank].split(2):
            part = stage(None, micro_batch) / whole.loss_count()
            part.backward()
            loss = loss + part.detach()
        load = experts.finish_step(BATCH)
        _sum(loss, context[DATA_AXES])
        result.losses.append(loss.item())
        result.tokens.append(load.tokens)
        result.biases.append(load.biases)
        for p in stage.parameters():
            _sum(p.grad, context[spec_of(p).averaged_over])
            p.data -= LEARNING_RATE * p.grad
    result.gradients = _merged([(spec_of(p), p.grad) for p in stage.parameters()])
    return result


def _sum(tensor, ranks):
    if ranks.size > 1:
        dist.all_reduce(tensor, group=ranks.group)


def _merged(parts: list) -> dict[str, torch.Tensor]:
    """Full gradients from all ranks' slices."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, parts)
    full: dict[str, torch.Tensor] = {}
    for spec, gradient in (part for parts in everyone for part in parts):
        whole = full.setdefault(spec.name, torch.full(spec.full_shape, torch.nan, dtype=gradient.dtype))
        whole[spec.box] = gradient[tuple(slice(0, n) for n in spec.box_shape)]
    return full


def assert_equal_to_reference(result: Result, want: Result) -> None:
    torch.testing.assert_close(torch.tensor(result.losses), torch.tensor(want.losses), **CLOSE)
    assert result.tokens == want.tokens
    assert result.biases == want.biases
    assert result.gradients.keys() == want.gradients.keys()
    for name, gradient in want.gradients.items():
        scale = gradient.abs().max().item()
        tolerance = {"rtol": CLOSE["rtol"], "atol": 1e-9 * scale}
        torch.testing.assert_close(result.gradients[name], gradient, **tolerance, msg=name)


def departures(rank: int, layouts: list[Layout], wanted: dict[str, Result]) -> list[str]:
    """For each layout how it departs from the reference; empty if it does not."""
    found = []
    wanted = wanted | {"quantile": run_layout(rank, QUANTILES)}
    for layout in layouts:
        try:
            with FAULTS[layout.fault]():
                assert_equal_to_reference(run_layout(rank, layout), wanted[layout.reference])
            found.append("")
        except AssertionError:
            found.append(traceback.format_exc())
    return found


# Faults that routers have had elsewhere.


def wrong_router(self, x, padding=None, *, gate_has_bias=False, ignores_bias=False):
    scores = F.linear(x, self.weight).sigmoid()
    biased = scores.detach() + (0 if ignores_bias else self.bias)
    chosen = biased.topk(self.config.num_experts_per_tok).indices
    if self.observer is not None:
        self.observer(scores.detach(), chosen, padding, None)
    gates = (scores + self.bias if gate_has_bias else scores).gather(-1, chosen)
    return chosen, gates / gates.sum(-1, keepdim=True) * self.config.routed_scaling_factor


def padding_counted(observe):
    return lambda *told: observe(*told[:-2], None, told[-1])


def patched_router(**flags):
    return patch.object(TopKRouter, "forward", lambda *args: wrong_router(*args, **flags))


FAULTS = {
    "": nullcontext,
    "none, but another router": patched_router,
    "bias enters the gate": partial(patched_router, gate_has_bias=True),
    "selection ignores the bias": partial(patched_router, ignores_bias=True),
    "counts what is computed again": lambda: patch.object(llama, "unobserved", lambda block: nullcontext()),
    "counts padding": lambda: patch.object(
        ExpertBalancing, "_observe", padding_counted(ExpertBalancing._observe)
    ),
    "counts one rank's tokens": lambda: patch.object(balancing, "_sum_over", lambda group, tensor: None),
}
FAULTY = [Layout(ep=2, recompute="full", fault=fault) for fault in FAULTS if fault]


@pytest.fixture(scope="module")
def departure_of():
    wanted = {kind: reference(Layout(model_kind=kind).model) for kind in ("experts", "softmax")}
    layouts = LAYOUTS + LIKE_QUANTILES + FAULTY
    found = run_distributed(departures, 4, layouts, wanted, timeout_seconds=600)
    return {layout: [of_rank[i] for of_rank in found] for i, layout in enumerate(layouts)}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_losses_gradients_counts_and_biases_are_those_of_transformers(layout, departure_of):
    assert departure_of[layout] == [""] * 4


@pytest.mark.parametrize("layout", LIKE_QUANTILES, ids=str)
def test_quantiles_move_the_biases_alike_bit_for_bit(layout, departure_of):
    assert departure_of[layout] == [""] * 4


@pytest.mark.parametrize("layout", FAULTY, ids=lambda layout: layout.fault)
def test_control_a_wrong_router_is_noticed(layout, departure_of):
    is_right = layout.fault.startswith("none")
    assert all((text == "") == is_right for text in departure_of[layout])


# Any imbalance.


def unbalanced_layer(rank: int, favourites: list[list[int]]) -> list[float]:
    """Largest differences between ep 2 and one process where all tokens choose the same two experts."""
    context = ParallelContext.build(Topology(2, ep_size=2), rank, torch.device("cpu"))
    config, differences = EXPERTS.model_copy(update={"n_shared_experts": 0}), []
    for experts in favourites:
        spread, whole = (
            MixtureOfExperts(config, LayerPlan(c, init=drawn, dtype=torch.float64), name="mlp")
            for c in (context, ParallelContext())
        )
        for layer in (spread, whole):
            layer.gate.bias[experts] = 10.0
        x = drawn("x", (6, 2, 2, config.hidden_size)).double()[:, rank].requires_grad_()
        y, z = spread(x), whole(x)
        (grad_y,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
        (grad_z,) = torch.autograd.grad(z.square().sum(), x, retain_graph=True)
        y.square().sum().backward()
        assert spread.experts.gate_proj.grad is not None  # zeros where no token came
        differences += [(y - z).abs().max().item(), (grad_y - grad_z).abs().max().item()]
    return differences


def drawn(name, shape, box=()):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))[box]


def test_no_token_is_lost_where_all_choose_the_same_experts_and_a_rank_has_none():
    for differences in run_distributed(unbalanced_layer, 2, [[0, 1], [6, 7], [3, 4]]):
        assert max(differences) < 1e-13


# Grouped products.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[5, 0, 12, 3], [20, 0, 0, 0], [0, 0, 0, 20]], ids=str)
def test_the_grouped_product_is_the_loop(dtype, counts):
    """The same products of the same numbers; sums of 16 and of 20 terms, in another order at most."""
    inputs = [drawn(name, shape).to(dtype) for name, shape in (("x", (20, 16)), ("weight", (4, 8, 16)))]
    assert has_kernel(*inputs)
    results = []
    for kernel in (True, False):
        x, weight = (t.clone().requires_grad_() for t in inputs)
        y = grouped_linear(x, weight, torch.tensor(counts), kernel=kernel)
        y.sum().backward()  # its gradient is expanded, which the kernel refuses
        results.append((y, x.grad, weight.grad))
    eps = torch.finfo(dtype).eps
    for grouped, loop in zip(*results, strict=True):
        torch.testing.assert_close(grouped, loop, rtol=4 * eps, atol=8 * eps)
    assert not results[0][2][torch.tensor(counts) == 0].any()


@pytest.mark.parametrize(
    ("rows", "shape", "dtype"),
    [(20, (4, 8, 16), torch.float64), (20, (4, 6, 16), torch.float32), (0, (4, 8, 16), torch.float32)],
)
def test_where_there_is_no_kernel_the_loop_is_taken(rows, shape, dtype):
    x, weight = drawn("x", (rows, shape[2])).to(dtype), drawn("weight", shape).to(dtype)
    assert not has_kernel(x, weight)
    counts = torch.tensor([rows, 0, 0, 0])
    torch.testing.assert_close(grouped_linear(x, weight, counts), x @ weight[0].T)


# The balancing loss.


def test_the_balancing_loss_is_least_where_all_experts_share_alike():
    chosen = torch.arange(8).view(4, 1, 2)
    even = auxiliary_loss(torch.full((4, 1, 8), 0.5), chosen)
    skewed = auxiliary_loss(F.one_hot(torch.zeros(4, 1, dtype=torch.long), 8) + 0.1, chosen * 0)
    assert even == pytest.approx(1.0)
    assert skewed > 2


def test_a_sample_of_padding_alone_has_no_balancing_loss():
    scores, chosen = torch.rand(4, 2, 8), torch.arange(16).view(4, 2, 2) % 8
    padding = torch.zeros(4, 2, dtype=torch.bool)
    padding[:, 1] = True
    alone = auxiliary_loss(scores[:, :1], chosen[:, :1])
    torch.testing.assert_close(auxiliary_loss(scores, chosen, padding), alone)


def test_in_evaluation_nothing_is_counted():
    stage = LlamaStage(EXPERTS, seed=SEED)
    rule = RULES["sign"](BalancingConfig(), EXPERTS)
    experts = ExpertBalancing(EXPERTS, stage.routers(), rule, ParallelContext())
    experts.begin_step(0.0)
    with torch.no_grad():
        stage(None, batch_of(0))
    stage.eval()
    stage(None, batch_of(0))
    assert all(sum(tokens) == 0 for tokens in experts.finish_step(BATCH).tokens.values())
