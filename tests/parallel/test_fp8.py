"""Linear layers in fp8: cut over ranks they round as one process does, and their mistakes are told.

Values range over 2^20 along tokens, inputs and outputs, so that a rank's own largest value is often not that
of all, and what a scale loses is lost in plain sight. Both sides multiply the same 8-bit numbers, exactly in
float32; sums of up to 128 of them in another order differ by some 1e-6 of their largest terms, which 1e-5 of
the largest result allows. A scale of the rank alone is off by 1e-2 and more (the control below).
"""

from functools import cache
from itertools import product

import pytest
import torch
import torch.distributed as dist

from megalite.config import fp8 as config
from megalite.parallel import fp8
from megalite.parallel.context import ParallelContext
from megalite.parallel.deferred import DeferredGradients, scalar_of
from megalite.parallel.fp8 import CAPABILITY, RECIPES, Fp8Error, choose_recipe
from megalite.parallel.linear import Column, MergedColumnLinear, RowParallelLinear
from megalite.parallel.plan import LayerPlan, Lora
from megalite.parallel.topology import Topology
from tests.fp8_reference import linear
from tests.harness import run_distributed

S, B, INPUTS, OUTPUTS, HEAD = 64, 2, 64, 64, 16
CPU = torch.device("cpu")
LAYOUTS = {2: [(2, 1), (1, 2)], 4: [(4, 1), (2, 2)]}  # world size -> (tp, cp)


def powers(size):
    """From 1 to 2^20, evenly."""
    return 2.0 ** torch.linspace(0, 20, size)


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(num_inputs, num_outputs, seed=0):
    """x [S, B, i], W [o, i] and dy [S, B, o] whose ranges are inverse to each other where they meet."""
    n, i, o = powers(S).view(S, 1, 1), powers(num_inputs), powers(num_outputs)
    x = drawn(seed, S, B, num_inputs) * n / i
    weight = drawn(seed + 1, num_outputs, num_inputs) * i / o.unsqueeze(1)
    return x, weight, drawn(seed + 2, S, B, num_outputs) * o / n


def context_of(rank, world_size, tp, cp):
    """Of layers with two key heads."""
    topology = Topology(world_size, tp_size=tp, cp_size=cp, kv_copy_size=max(1, tp // 2))
    return ParallelContext.build(topology, rank, CPU)


def part(x, ranks, dim):
    return x.chunk(ranks.size, dim)[ranks.rank].clone()


def backward(layer, y, grads, weights):
    torch.autograd.backward(y, grads)
    if layer.plan.deferred is not None:
        assert all(weight.grad is None for weight in weights)
        scalar_of(layer.plan.deferred.take()).backward()
    for weight in weights:
        if layer.plan.context["cp"].size > 1:  # as ZeRO sums them
            dist.all_reduce(weight.grad, group=layer.plan.context["cp"].group)


def off(got, want):
    return (got - want).abs().max() > 1e-5 * want.abs().max()


def column_differences(plan, recipe):
    """Of queries, and of keys whose copies are each used in another way: what is not as in one process."""
    tp, cp = plan.context["tp"], plan.context["cp"]
    x, q, grad_q = inputs_of(INPUTS, OUTPUTS)
    _, k, _ = inputs_of(INPUTS, 2 * HEAD, seed=7)
    copies = max(1, tp.size // 2)
    parts = torch.stack([inputs_of(INPUTS, 2 * HEAD, seed=9 + copy)[2] for copy in range(copies)])
    whole = [tensor.clone().requires_grad_() for tensor in (x, q, k)]
    expected = [linear(whole[0], weight, recipe) for weight in whole[1:]]
    torch.autograd.backward(expected, [grad_q, parts.sum(0)])
    layer = MergedColumnLinear(INPUTS, [Column("q", OUTPUTS), Column("k", 2 * HEAD, cut_over="kv")], plan)
    with torch.no_grad():
        layer.q_weight.copy_(layer.q_weight.spec.cut(q))
        layer.k_weight.copy_(layer.k_weight.spec.cut(k))
    local_x = part(x, cp, 0)
    local_x = (part(local_x, tp, 0) if plan.sequence_parallel else local_x).requires_grad_()
    y = layer(local_x)
    kv = plan.context["kv"]
    mine = part(parts[plan.context["kv_copy"].rank], cp, 0).chunk(kv.size, -1)[kv.rank]
    backward(layer, y, [part(part(grad_q, cp, 0), tp, -1), mine], [layer.q_weight, layer.k_weight])
    want_dx = part(whole[0].grad, cp, 0)
    want_dx = part(want_dx, tp, 0) if plan.sequence_parallel else want_dx
    pairs = {
        "y q": (y[0], part(part(expected[0], cp, 0), tp, -1)),
        "y k": (y[1], part(expected[1], cp, 0).chunk(kv.size, -1)[kv.rank]),
        "dx": (local_x.grad, want_dx),
        "dw q": (layer.q_weight.grad, layer.q_weight.spec.cut(whole[1].grad)),
        "dw k": (layer.k_weight.grad, layer.k_weight.spec.cut(whole[2].grad)),
    }
    return {name.split()[0] for name, pair in pairs.items() if off(*pair)}


def row_differences(plan, recipe):
    tp, cp = plan.context["tp"], plan.context["cp"]
    x, weight, grad = inputs_of(INPUTS, OUTPUTS)
    whole_x, whole_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = linear(whole_x, whole_weight, recipe)
    expected.backward(grad)
    layer = RowParallelLinear(INPUTS, OUTPUTS, plan)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.spec.cut(weight))
    local_x = part(part(x, cp, 0), tp, -1).requires_grad_()
    y = layer(local_x)
    local_grad, local_y = part(grad, cp, 0), part(expected, cp, 0)
    if plan.sequence_parallel:
        local_grad, local_y = part(local_grad, tp, 0), part(local_y, tp, 0)
    backward(layer, [y], [local_grad], [layer.weight])
    pairs = {
        "y": (y, local_y),
        "dx": (local_x.grad, part(part(whole_x.grad, cp, 0), tp, -1)),
        "dw": (layer.weight.grad, layer.weight.spec.cut(whole_weight.grad)),
    }
    return {name for name, pair in pairs.items() if off(*pair)}


LAYERS = {"column": column_differences, "row": row_differences}


def differences(rank, world_size):
    """(layer, tp, cp, recipe, sequence parallel, deferred, scales of the rank alone) -> what differs."""
    found, over_ranks = {}, fp8._largest_over
    layouts = LAYOUTS.get(world_size, [(1, 1)])
    contexts = {sizes: context_of(rank, world_size, *sizes) for sizes in layouts}
    for (tp, cp), recipe, is_cut, deferred, alone in product(
        layouts, RECIPES, (False, True), (False, True), (False, True)
    ):
        fp8._largest_over = (lambda peak, group: peak) if alone else over_ranks
        for name, layer in LAYERS.items():
            later = DeferredGradients() if deferred else None
            plan = LayerPlan(contexts[tp, cp], is_cut, fp8=RECIPES[recipe], deferred=later)
            found[name, tp, cp, recipe, is_cut, deferred, alone] = layer(plan, recipe)
    fp8._largest_over = over_ranks
    return found


@cache
def differences_of_world(world_size):
    """On any rank."""
    by_rank = run_distributed(differences, world_size, world_size)
    return {key: set().union(*(found[key] for found in by_rank)) for key in by_rank[0]}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_layer_cut_over_ranks_rounds_as_one_process_does(world_size):
    wrong = {key: found for key, found in differences_of_world(world_size).items() if found and not key[-1]}
    assert not wrong


# layer, axis, recipe -> what a maximum over the ranks of that axis decides; the table of parallel/fp8.py
DEPENDS = {
    ("column", "tp", "tensorwise"): {"y", "dx", "dw"},
    ("row", "tp", "tensorwise"): {"y", "dx", "dw"},
    ("column", "cp", "tensorwise"): {"y", "dx", "dw"},
    ("row", "cp", "tensorwise"): {"y", "dx", "dw"},
    ("column", "tp", "rowwise"): {"dx"},
    ("row", "tp", "rowwise"): {"y"},
    ("column", "cp", "rowwise"): {"dw"},
    ("row", "cp", "rowwise"): {"dw"},
    ("column", "tp", "rowwise_with_gw_hp"): {"dx"},
    ("row", "tp", "rowwise_with_gw_hp"): {"y", "dx"},
    ("column", "cp", "rowwise_with_gw_hp"): set(),
    ("row", "cp", "rowwise_with_gw_hp"): set(),
}


@pytest.mark.parametrize("world_size", [2, 4])
def test_control_scales_of_the_rank_alone_are_noticed_where_the_table_says(world_size):
    for (name, tp, cp, recipe, _, _, alone), found in differences_of_world(world_size).items():
        axes = [axis for axis, size in (("tp", tp), ("cp", cp)) if size > 1]
        expected = set().union(*(DEPENDS[name, axis, recipe] for axis in axes))
        assert not alone or found == expected, (name, tp, cp, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_beside_an_adapter_the_weight_alone_is_rounded(recipe):
    """Of rank 6, which fp8 would not multiply."""
    plan = LayerPlan(fp8=RECIPES[recipe], lora=Lora(rank=6, scale=0.5, targets=("q", "row")))
    x, grad = drawn(0, S, B, INPUTS).requires_grad_(), drawn(1, S, B, OUTPUTS)
    column, row = (
        MergedColumnLinear(INPUTS, [Column("q", OUTPUTS)], plan),
        RowParallelLinear(INPUTS, OUTPUTS, plan, name="row"),
    )
    for layer, weight, adapter in (
        (lambda x: column(x)[0], column.q_weight, column.adapters["q"]),
        (row, row.weight, row.adapter),
    ):
        torch.nn.init.normal_(adapter.lora_B)
        expected = linear(x, weight, recipe) + 0.5 * (x @ adapter.lora_A.T @ adapter.lora_B.T)
        wanted = torch.autograd.grad(expected, [x, adapter.lora_A], grad)
        y = layer(x)
        got = torch.autograd.grad(y, [x, adapter.lora_A], grad)
        pairs = zip([y, *got], [expected, *wanted], strict=True)
        assert not any(off(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(recipe, value):
    """As the guard of a run's steps needs it, in the output and in both gradients."""
    layer = RowParallelLinear(INPUTS, OUTPUTS, LayerPlan(fp8=RECIPES[recipe]))
    x = torch.randn(16, 1, INPUTS, requires_grad=True)
    bad = x.detach().clone()
    bad[3, 0, 5] = value
    assert not layer(bad).isfinite().all()
    grad = torch.ones(16, 1, OUTPUTS)
    grad[3, 0, 5] = value
    layer(x).backward(grad)
    assert not x.grad.isfinite().all() and not layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_zeros_give_zeros(recipe):
    layer = RowParallelLinear(INPUTS, OUTPUTS, LayerPlan(fp8=RECIPES[recipe]))
    x = torch.zeros(16, 1, INPUTS, requires_grad=True)
    y = layer(x)
    y.backward(torch.zeros_like(y))
    assert not y.any() and not x.grad.any() and not layer.weight.grad.any()


def test_one_scale_of_each_tensor_is_what_torch_makes_of_it():
    """The way of a GPU, here by torch's own kernel for a scale of each tensor."""
    a, b = drawn(1, 32, 64), drawn(2, 48, 64)
    rounded = RECIPES["tensorwise"].output
    (a8, a_scale), (b8, b_scale) = rounded.a.rounded(a, None, None), rounded.b.rounded(b, None, None)
    assert a_scale.shape == b_scale.shape == (1, 1)
    expected = torch._scaled_mm(a8, b8.T, a_scale, b_scale, out_dtype=torch.float32)
    got = rounded(a, b, a_over=None, b_over=None, inner_over=None)
    assert not off(got, expected)


@pytest.mark.parametrize(("num_tokens", "sizes"), [(16, (24, 32)), (16, (32, 24)), (20, (32, 32))])
def test_sizes_that_are_no_multiples_of_16_are_refused(num_tokens, sizes):
    layer = RowParallelLinear(*sizes, LayerPlan(fp8=RECIPES["rowwise"]))
    with pytest.raises(Fp8Error, match=r"multiples of 16, and here \[\d+, \d+\] meets \[\d+, \d+\]"):
        layer(torch.randn(num_tokens, 1, sizes[0])).sum().backward()


def test_the_configuration_asks_for_the_same_multiple():
    assert config.MULTIPLE == fp8.MULTIPLE


@pytest.mark.parametrize(
    ("device", "precision", "capability", "line"),
    [
        ("cuda", "bf16", (8, 0), "needs GPUs of compute capability 8.9 .* and this one has 8.0: set fp8"),
        ("cuda", "fp32", (9, 0), "rounds bf16 on a GPU and the DeepSpeed JSON says fp32"),
        ("xpu", "bf16", None, "is for NVIDIA GPUs"),
    ],
)
def test_where_there_is_no_fp8_it_is_refused(device, precision, capability, line):
    with pytest.raises(Fp8Error, match=line):
        choose_recipe("rowwise", torch.device(device), precision, lambda device: capability)
    assert choose_recipe("none", torch.device(device), precision, lambda device: capability) is None


def test_where_there_is_fp8_the_recipe_is_given():
    for version in (CAPABILITY, (9, 0), (12, 0)):
        recipe = choose_recipe("rowwise", torch.device("cuda"), "bf16", lambda device, v=version: v)
        assert recipe is RECIPES["rowwise"]
    assert all(choose_recipe(name, CPU, "fp32") is recipe for name, recipe in RECIPES.items())
