"""Each parallel layer equals its unsharded torch.nn twin: outputs and all gradients, in float64.

Both sides compute the same sums in another order, so they differ by a few units of float64's 1e-16
relative error: 1e-11 leaves room for the sums' length and would not hide a wrong term.
"""

import traceback
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from itertools import product
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megalite.config.model import ModelConfig
from megalite.kernels.products import MatrixProducts
from megalite.model.attention import ParallelAttention, kv_copies
from megalite.model.mlp import ParallelMLP
from megalite.model.rope import RotaryEmbedding
from megalite.parallel import context, mappings
from megalite.parallel.context import ParallelContext
from megalite.parallel.cross_entropy import vocab_parallel_cross_entropy
from megalite.parallel.deferred import DeferredGradients, scalar_of
from megalite.parallel.embedding import VocabParallelEmbedding, padded_vocab_size, vocabulary_spec
from megalite.parallel.head import VocabParallelHead
from megalite.parallel.linear import Column, ColumnParallelLinear, MergedColumnLinear, RowParallelLinear
from megalite.parallel.mappings import (
    copy_to_tp,
    exchange,
    gather_sequence,
    reduce_from_tp,
    scatter_sequence,
    sum_over,
)
from megalite.parallel.node_memory import NodeMemory, node_memory, share_memory
from megalite.parallel.norm import ParallelRMSNorm
from megalite.parallel.plan import LayerPlan
from megalite.parallel.shard import normal_initializer, sharded_parameter
from megalite.parallel.topology import Topology
from tests.harness import run_distributed

S, B, H, OUT, V = 8, 3, 12, 24, 37
DTYPE = torch.float64
INIT = normal_initializer(seed=3, std=0.5)
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


def plan_of(group, sequence_parallel=False, kv_copy_size=1):
    topology = Topology(group.size(), tp_size=group.size(), kv_copy_size=kv_copy_size)
    ranks = ParallelContext.build(topology, group.rank(), torch.device("cpu")).share_memory()
    return LayerPlan(ranks, sequence_parallel, INIT, DTYPE)


def full(name, *shape):
    """The same random tensor on every rank, with gradients."""
    return normal_initializer(seed=11, std=1.0)(name, shape).to(DTYPE).requires_grad_()


def mine(x, group, dim=0):
    """This rank's slice of a tensor that all ranks hold whole."""
    return x.detach().chunk(group.size(), dim)[group.rank()].clone().requires_grad_()


def weight_of(name, *shape):
    return INIT(name, shape).to(DTYPE).requires_grad_()


def assert_slice(local, whole, spec):
    """A local gradient is the twin's gradient, cut as the parameter is; padding has none."""
    torch.testing.assert_close(local, spec.cut(whole), **CLOSE)


def with_and_without_deferring(plan):
    """A plan, and the same with weight gradients left for later, inputs gathered again or kept."""
    return plan, *(replace(plan, deferred=DeferredGradients(keeps)) for keeps in (False, True))


def every_plan(group):
    """With and without sequence parallelism too."""
    for sequence_parallel in (False, True):
        yield from with_and_without_deferring(plan_of(group, sequence_parallel))


def finish_backward(layer, *weights):
    """Compute what was left for later; until then the weights had no gradient."""
    if layer.plan.deferred is not None:
        assert all(weight.grad is None for weight in weights)
        scalar_of(layer.plan.deferred.take()).backward()


def column_equals_linear(group):
    for plan in every_plan(group):
        sequence_parallel = plan.sequence_parallel
        layer = ColumnParallelLinear(H, OUT, plan, bias=True)
        x, grad = full("x", S, B, H), full("grad", S, B, OUT).detach()
        weight, bias = weight_of("weight", OUT, H), torch.zeros(OUT, dtype=DTYPE, requires_grad=True)
        F.linear(x, weight, bias).backward(grad)
        local_x = mine(x, group) if sequence_parallel else x.detach().clone().requires_grad_()
        y = layer(local_x)
        y.backward(mine(grad, group, -1).detach())
        finish_backward(layer, layer.weight)
        torch.testing.assert_close(y, mine(F.linear(x, weight, bias), group, -1), **CLOSE)
        expected = mine(x.grad, group) if sequence_parallel else x.grad
        torch.testing.assert_close(local_x.grad, expected.detach(), **CLOSE)
        assert_slice(layer.weight.grad, weight.grad, layer.weight.spec)
        assert_slice(layer.bias.grad, bias.grad, layer.bias.spec)


def row_equals_linear(group):
    plans = list(every_plan(group))
    # In pieces of other sizes, too: 3 of the rows of a rank which 3 does not divide, and one of each row.
    plans += [replace(plan, row_chunks=chunks) for plan in plans for chunks in (2, 3, 1000)]
    for plan in plans:
        sequence_parallel = plan.sequence_parallel
        layer = RowParallelLinear(OUT, H, plan, bias=True)
        x, grad = full("x", S, B, OUT), full("grad", S, B, H).detach()
        weight, bias = weight_of("weight", H, OUT), torch.zeros(H, dtype=DTYPE, requires_grad=True)
        expected = F.linear(x, weight, bias)
        expected.backward(grad)
        local_x = mine(x, group, -1)
        y = layer(local_x)
        y.backward(mine(grad, group).detach() if sequence_parallel else grad)
        finish_backward(layer, layer.weight)
        torch.testing.assert_close(y, mine(expected, group) if sequence_parallel else expected, **CLOSE)
        torch.testing.assert_close(local_x.grad, mine(x.grad, group, -1).detach(), **CLOSE)
        assert_slice(layer.weight.grad, weight.grad, layer.weight.spec)
        torch.testing.assert_close(layer.bias.grad, bias.grad, **CLOSE)


def merged_columns_equal_linears_with_copies(group):
    """Two KV-like heads over more ranks than heads: copies hold the same rows and sum their gradients."""
    size, heads = group.size(), min(2, group.size())
    copies = size // heads
    plan = plan_of(group, sequence_parallel=True, kv_copy_size=copies)
    columns = [Column("q", OUT), Column("k", heads * 4, cut_over="kv")]
    for each in with_and_without_deferring(plan):
        layer = MergedColumnLinear(H, columns, each, bias=True, name="m")
        merged_equals_linears(layer, group, heads, copies)


def merged_equals_linears(layer, group, heads, copies):
    size = group.size()
    x = full("x", S, B, H)
    grad_q, grad_k = full("gq", S, B, OUT).detach(), full("gk", size, S, B, 4).detach()
    q, k = weight_of("m.q.weight", OUT, H), weight_of("m.k.weight", heads * 4, H)
    twin_k = F.linear(x, k).unflatten(-1, (heads, 4))
    loss = (F.linear(x, q) * grad_q).sum()
    for rank in range(size):  # each rank uses its copy in its own way
        loss = loss + (twin_k[..., rank // copies, :] * grad_k[rank]).sum()
    loss.backward()
    local_x = mine(x, group)
    y_q, y_k = layer(local_x)
    ((y_q * mine(grad_q, group, -1)).sum() + (y_k * grad_k[group.rank()]).sum()).backward()
    finish_backward(layer, layer.q_weight, layer.k_weight)
    torch.testing.assert_close(local_x.grad, mine(x.grad, group).detach(), **CLOSE)
    assert_slice(layer.q_weight.grad, q.grad, layer.q_weight.spec)
    assert_slice(layer.k_weight.grad, k.grad, layer.k_weight.spec)
    expected_bias = grad_k.reshape(heads, copies, S * B, 4).sum((1, 2)).flatten()
    assert_slice(layer.k_bias.grad, expected_bias, layer.k_bias.spec)
    assert layer.k_weight.model_parallel == (group.rank() % copies == 0)


def embedding_equals_embedding(group):
    for sequence_parallel in (False, True):
        layer = VocabParallelEmbedding(V, H, plan_of(group, sequence_parallel))
        ids = torch.arange(S * B).reshape(S, B) * 7 % V
        grad, table = full("grad", S, B, H).detach(), weight_of("weight", V, H)
        expected = F.embedding(ids, table)
        expected.backward(grad)
        y = layer(ids)
        y.backward(mine(grad, group).detach() if sequence_parallel else grad)
        torch.testing.assert_close(y, mine(expected, group) if sequence_parallel else expected, **CLOSE)
        assert_slice(layer.weight.grad, table.grad, layer.weight.spec)


def norm_equals_rms_norm(group):
    for sequence_parallel in (False, True):
        layer = ParallelRMSNorm(H, plan_of(group, sequence_parallel))
        twin = torch.nn.RMSNorm(H, eps=1e-5, dtype=DTYPE)
        with torch.no_grad():
            for weight in (layer.weight, twin.weight):
                weight.copy_(full("w", H))
        x, grad = full("x", S, B, H), full("grad", S, B, H).detach()
        twin(x).backward(grad)
        local_x = mine(x, group) if sequence_parallel else x.detach().clone().requires_grad_()
        layer(local_x).backward(mine(grad, group).detach() if sequence_parallel else grad)
        expected = mine(x.grad, group).detach() if sequence_parallel else x.grad
        torch.testing.assert_close(local_x.grad, expected, **CLOSE)
        torch.testing.assert_close(layer.weight.grad, twin.weight.grad, **CLOSE)


def loss_equals_cross_entropy_and_padding_never_counts(group):
    padded = padded_vocab_size(V, group.size(), multiple=16)
    logits, labels = full("logits", S, B, padded), torch.arange(S * B).reshape(S, B) * 5 % V
    weights = full("weights", S, B).detach()
    expected = F.cross_entropy(logits[..., :V].flatten(0, 1), labels.flatten(), reduction="none")
    (expected.view(S, B) * weights).sum().backward()
    local = mine(logits, group, -1)
    loss = vocab_parallel_cross_entropy(local, labels, vocab_size=V, group=group)
    (loss * weights).sum().backward()
    torch.testing.assert_close(loss, expected.view(S, B), **CLOSE)
    torch.testing.assert_close(local.grad, mine(logits.grad, group, -1).detach(), **CLOSE)


HEAD_V = 300  # over 2 ranks the second is padded, over 4 the last holds nothing but padding


def head_of(group, sequence_parallel):
    plan = plan_of(group, sequence_parallel)
    spec = vocabulary_spec(plan.context, "weight", (HEAD_V, H))
    return VocabParallelHead(H, HEAD_V, plan, sharded_parameter(spec, INIT, DTYPE))


def head_labels():
    labels = torch.arange(S * B).reshape(S, B) * 29 % HEAD_V
    labels[3:5] = labels[-1, 1] = -100
    return labels


def head_equals_linear_and_cross_entropy(group):
    """Sums and losses of each token; tokens one by one, in unequal chunks, and all at once."""
    labels, weights, scale = head_labels(), full("weights", S, B).detach().abs(), 0.37
    x, weight = full("x", S, B, H), weight_of("weight", HEAD_V, H)
    each = F.cross_entropy(F.linear(x, weight).flatten(0, 1), labels.flatten(), reduction="none").view(S, B)
    for reduction, given in (("sum", None), ("sum", weights), ("none", weights)):
        used = torch.ones_like(weights) if given is None else given
        grads = torch.autograd.grad((each * used).sum() * scale, (x, weight), retain_graph=True)
        for sequence_parallel in (False, True):
            for tokens in (1, 7, S * B):
                head = head_of(group, sequence_parallel)
                head.chunk_logits = tokens * len(head.weight)
                local_x = mine(x, group) if sequence_parallel else x.detach().clone().requires_grad_()
                if reduction == "sum":
                    loss = head(local_x, labels, given)
                    torch.testing.assert_close(loss, (each * used).sum(), **CLOSE)
                else:
                    losses = head(local_x, labels, reduction="none")
                    torch.testing.assert_close(losses, each, **CLOSE)
                    loss = (losses * used).sum()
                (loss * scale).backward()
                expected = mine(grads[0], group).detach() if sequence_parallel else grads[0]
                torch.testing.assert_close(local_x.grad, expected, **CLOSE)
                assert_slice(head.weight.grad, grads[1], head.weight.spec)


def head_computes_no_gradient_that_is_not_wanted(group):
    """In evaluation none, of a frozen weight that of the input alone: each product is counted."""
    head, labels = head_of(group, False), head_labels()
    count, products = Counter(), head.plan.products
    counted = {name: _counted(name, getattr(products, name), count) for name in vars(products)}
    kernels = replace(head.plan.kernels, products=MatrixProducts(**counted))
    head.plan = replace(head.plan, kernels=kernels)
    x = full("x", S, B, H)
    with torch.no_grad():
        for reduction in ("sum", "none"):
            head(x, labels, reduction=reduction)
    assert count == {"output": 2}
    head.weight.requires_grad_(False)
    head(x, labels).backward()
    assert count == {"output": 3, "input_gradient": 1}
    assert x.grad is not None and head.weight.grad is None


def _counted(name, product, count):
    def counting(*tensors):
        count[name] += 1
        return product(*tensors)

    return counting


def mappings_are_transposes(group):
    """<f(x), y> summed over ranks equals <x, f'(y)>: the definition of a transpose."""
    size, rank = group.size(), group.rank()
    shapes = [
        (copy_to_tp, (S, B), (S, B), True),
        (reduce_from_tp, (S, B), (S, B), False),
        (gather_sequence, (S // size, B), (S, B), False),
        (scatter_sequence, (S, B), (S // size, B), False),
        (exchange, (size, S, B), (size, S, B), False),
        (sum_over, (S, B), (S, B), False),
    ]
    for mapping, shape_in, shape_out, input_is_shared in shapes:
        x = full("shared" if input_is_shared else f"x{rank}", *shape_in)
        y = full("y" if mapping is reduce_from_tp else f"y{rank}", *shape_out).detach()
        before = x.detach().clone(), y.clone()
        image = mapping(x * 1, group)
        (pulled,) = torch.autograd.grad(image, x, y)
        sums = torch.stack([(image * y).sum(), (x * pulled).sum()]).detach()
        if mapping is copy_to_tp:  # x is one tensor that all ranks hold
            left = sums[:1].clone()
            dist.all_reduce(left, group=group)
            torch.testing.assert_close(left[0], sums[1], **CLOSE)
        elif mapping is reduce_from_tp:  # the image is one tensor that all ranks hold
            right = sums[1:].clone()
            dist.all_reduce(right, group=group)
            torch.testing.assert_close(sums[0], right[0], **CLOSE)
        else:
            dist.all_reduce(sums, group=group)
            torch.testing.assert_close(sums[0], sums[1], **CLOSE)
        assert torch.equal(before[0], x) and torch.equal(before[1], y), "a collective wrote to its input"


def collectives_write_only_to_their_own(group):
    """Where a tensor has two uses, an in-place collective would corrupt the other one."""
    w = torch.ones(S, B, dtype=DTYPE, requires_grad=True)
    (copy_to_tp(w, group) + w).sum().backward()
    torch.testing.assert_close(w.grad, torch.full_like(w, group.size() + 1.0), **CLOSE)
    x = torch.zeros(S, B, dtype=DTYPE, requires_grad=True)
    reduce_from_tp(x.exp(), group).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x), **CLOSE)


CONFIG = ModelConfig(
    vocab_size=V,
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=1,
)


def attention_and_mlp_equal_one_process(group):
    copies = kv_copies(CONFIG.num_key_value_heads, group.size())
    for sequence_parallel in (False, True):
        plan = plan_of(group, sequence_parallel, copies)
        for make in (_attention, _mlp):
            layer, twin = make(plan), make(LayerPlan(init=INIT, dtype=DTYPE))
            x, grad = full("x", S, B, 16), full("grad", S, B, 16).detach()
            twin(x).backward(grad)
            local_x = mine(x, group) if sequence_parallel else x.detach().clone().requires_grad_()
            layer(local_x).backward(mine(grad, group).detach() if sequence_parallel else grad)
            expected = mine(x.grad, group).detach() if sequence_parallel else x.grad
            torch.testing.assert_close(local_x.grad, expected, **CLOSE)
            for local, whole in zip(layer.parameters(), twin.parameters(), strict=True):
                assert_slice(local.grad, whole.grad, local.spec)


def _attention(plan):
    return ParallelAttention(CONFIG, RotaryEmbedding(CONFIG), plan, name="a", recompute=True)


def _mlp(plan):
    return ParallelMLP(CONFIG, plan, name="m")


def layers_without_an_initializer_draw_from_torch_as_its_own_do(group):
    torch.manual_seed(5)
    first, second = (RowParallelLinear(OUT, H, replace(plan_of(group), init=None)) for _ in range(2))
    torch.manual_seed(5)
    again = RowParallelLinear(OUT, H, replace(plan_of(group), init=None))
    assert torch.equal(first.weight, again.weight) and not torch.equal(first.weight, second.weight)
    wide = ColumnParallelLinear(400, 400, replace(plan_of(group), init=None)).weight
    assert 0.99 / 20 < wide.abs().max() <= 1 / 20  # U(-1/sqrt(400), 1/sqrt(400))
    table = VocabParallelEmbedding(V * group.size() * 8, 40, replace(plan_of(group), init=None)).weight
    assert group.rank() > 0 or abs(table[: table.spec.box_shape[0]].std() - 1) < 0.05


def layers_say_their_full_and_local_shapes(group):
    layer = ColumnParallelLinear(H, OUT, plan_of(group), bias=True)
    here = f", [{OUT // group.size()}, {H}] here, cut over tp" if group.size() > 1 else ""
    assert f"weight=[{OUT}, {H}]{here}" in repr(layer) and f"bias=[{OUT}]" in repr(layer)
    assert f"weight=[{H}]" in repr(ParallelRMSNorm(H, plan_of(group)))


def ignored_labels_have_no_loss_and_no_gradient(group):
    logits = full("logits", S, B, padded_vocab_size(V, group.size(), multiple=16))
    labels = torch.arange(S * B).reshape(S, B) % V
    labels[::2] = -100
    local = mine(logits, group, -1)
    loss = vocab_parallel_cross_entropy(local, labels, vocab_size=V, group=group)
    (loss * full("weights", S, B).detach()).sum().backward()
    assert not loss[::2].any() and not local.grad[::2].any()
    assert loss[1::2].all() and (group.rank() > 0 or local.grad[1::2].any())
    expected = F.cross_entropy(logits[..., :V].flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(loss.sum() / (labels != -100).sum(), expected, **CLOSE)


PAIR = [(ColumnParallelLinear, H, OUT), (RowParallelLinear, OUT, H)]


# Of the backend, and of memory that the ranks share.
GATHERS_AND_SUMS = [
    (mappings, "_all_gather", "gather"),
    (dist, "all_to_all_single", "sum"),
    (NodeMemory, "all_gather", "gather"),
    (NodeMemory, "reduce_scatter", "sum"),
]


class Logged:
    """What layers do in a backward, in its order: products, and the beginnings and ends of collectives."""

    def __init__(self):
        self.events = []

    def products(self):
        standard, names = MatrixProducts(), {"input_gradient": "dx", "weight_gradient": "dW"}
        return MatrixProducts(**{n: self._product(getattr(standard, n), told) for n, told in names.items()})

    def _product(self, product, name):
        def logged(*tensors):
            self.events.append(name)
            return product(*tensors)

        return logged

    @contextmanager
    def collectives(self):
        with ExitStack() as stack:
            for place, start, name in GATHERS_AND_SUMS:
                logged = self._collective(getattr(place, start), name)
                stack.enter_context(patch.object(place, start, logged))
            yield

    def _collective(self, start, name):
        def logged(*tensors, **options):
            self.events.append(f"{name} begins")
            return Awaited(start(*tensors, **options), lambda: self.events.append(f"{name} ends"))

        return logged

    def taken(self):
        events, self.events = self.events, []
        return events


class Awaited:
    def __init__(self, work, ended):
        self.work, self.ended = work, ended

    def wait(self):
        self.work.wait()
        self.ended()


def communication_is_under_way_while_products_are_computed(group):
    """Two pairs of a column and a row layer, under sequence parallelism; the rows' own gather comes first."""
    if group.size() == 1:
        return
    for plan in with_and_without_deferring(plan_of(group, sequence_parallel=True)):
        log, deferred = Logged(), plan.deferred
        plan = replace(plan, kernels=replace(plan.kernels, products=log.products()))
        layers = [kind(*sizes, plan) for kind, *sizes in PAIR * 2]
        with log.collectives():
            y = mine(full("x", S, B, H), group)
            for layer in layers:
                y = layer(y)
            log.taken()
            y.sum().backward()
            together = log.taken()
            row = ["gather begins", "gather ends", "dx", "dW"]
            column = ["gather begins", "dx", "sum begins", "gather ends", "dW", "sum ends"]
            if deferred is None:
                assert together == [*row, *column] * 2, together
                continue
            scalar_of(deferred.take()).backward()
            later = log.taken()
        assert together == [*row[:3], "dx", "sum begins", "sum ends"] * 2, together
        gathered = ["gather begins", "gather ends", "dW", "gather begins", "dW", "gather ends", "dW", "dW"]
        assert later == (["dW"] * 4 if deferred.keeps_gathered else gathered), later


def pieces_of_rows_are_under_way_while_others_are_computed(group):
    """Row layers, in two pieces: a sum is begun before the next product, a gather too."""
    if group.size() == 1:
        return
    for plan in with_and_without_deferring(plan_of(group, sequence_parallel=True)):
        log, deferred = Logged(), plan.deferred
        standard = log.products()
        products = replace(standard, output=log._product(standard.output, "y"))
        plan = replace(plan, row_chunks=2, kernels=replace(plan.kernels, products=products))
        layer = RowParallelLinear(OUT, H, plan)
        with log.collectives():
            y = layer(mine(full("x", S, B, OUT), group, -1))
            there = log.taken()
            y.sum().backward()
            back = log.taken()
        assert there == ["y", "sum begins"] * 2 + ["sum ends"] * 2, there
        both = ["gather begins", "gather ends", "gather begins", "dx", "gather ends", "dx"]
        assert back == both + (["dW"] if deferred is None else []), back


CHECKS = [
    column_equals_linear,
    pieces_of_rows_are_under_way_while_others_are_computed,
    row_equals_linear,
    merged_columns_equal_linears_with_copies,
    embedding_equals_embedding,
    norm_equals_rms_norm,
    loss_equals_cross_entropy_and_padding_never_counts,
    ignored_labels_have_no_loss_and_no_gradient,
    head_equals_linear_and_cross_entropy,
    head_computes_no_gradient_that_is_not_wanted,
    mappings_are_transposes,
    collectives_write_only_to_their_own,
    attention_and_mlp_equal_one_process,
    layers_without_an_initializer_draw_from_torch_as_its_own_do,
    layers_say_their_full_and_local_shapes,
    communication_is_under_way_while_products_are_computed,
]


def run_checks(rank, through):
    """What each check found wrong, by its name: one that fails hides no other."""
    found = {}
    with patch.object(context, "share_memory", SHARINGS[through]):
        shares = node_memory(plan_of(dist.group.WORLD).tp_group, torch.ones(1)) is not None
        assert shares == (through == "memory" and dist.get_world_size() > 1)
        for check in CHECKS:
            try:
                check(dist.group.WORLD)
            except AssertionError:
                found[check.__name__] = traceback.format_exc()
    return found


SHARINGS = {"memory": share_memory, "sockets": lambda groups: None}


@cache
def failures_of_world(world_size, through):
    return run_distributed(run_checks, world_size, through)


@pytest.mark.parametrize(("world_size", "through"), [(1, "memory"), *product([2, 4], SHARINGS)], ids=str)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_parallel_layers_equal_their_unsharded_twins(check, world_size, through):
    for rank, failures in enumerate(failures_of_world(world_size, through)):
        assert check.__name__ not in failures, f"rank {rank}: {failures[check.__name__]}"


def test_a_parameter_that_does_not_divide_is_refused():
    def body(rank):
        with pytest.raises(ValueError, match=r"size 7 cannot be cut into 2 equal pieces"):
            ColumnParallelLinear(4, 7, plan_of(dist.group.WORLD))

    run_distributed(body, 2)


def norm_without_the_sum(group):
    layer = ParallelRMSNorm(H, plan_of(group, sequence_parallel=False))
    x = mine(full("x", S, B, H), group)
    layer(x).sum().backward()
    reference = torch.nn.RMSNorm(H, eps=1e-5, dtype=DTYPE)
    reference(full("x", S, B, H)).sum().backward()
    return torch.allclose(layer.weight.grad, reference.weight.grad)


def test_the_comparison_notices_a_norm_gradient_that_is_not_summed():
    assert not any(run_distributed(lambda rank: norm_without_the_sum(dist.group.WORLD), 2))
