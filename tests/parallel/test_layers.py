"""Each parallel layer equals its unsharded torch.nn twin: outputs and all gradients, in float64.

Both sides compute the same sums in another order, so they differ by a few units of float64's 1e-16
relative error: 1e-11 leaves room for the sums' length and would not hide a wrong term.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megalite.model.layout import StageLayout

from megalite.config.model import ModelConfig
from megalite.model.attention import ParallelAttention, kv_replicas
from megalite.model.mlp import ParallelMLP
from megalite.model.rope import RotaryEmbedding
from megalite.parallel.context import ParallelContext
from megalite.parallel.cross_entropy import vocab_parallel_cross_entropy
from megalite.parallel.embedding import VocabParallelEmbedding, padded_vocab_size
from megalite.parallel.linear import Column, ColumnParallelLinear, MergedColumnLinear, RowParallelLinear
from megalite.parallel.mappings import copy_to_tp, gather_sequence, reduce_from_tp, scatter_sequence
from megalite.parallel.norm import ParallelRMSNorm
from megalite.parallel.shard import normal_initializer
from megalite.parallel.topology import Topology
from tests.harness import run_distributed

S, B, H, OUT, V = 8, 3, 12, 24, 37
DTYPE = torch.float64
INIT = normal_initializer(seed=3, std=0.5)
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


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


def column_equals_linear(group):
    for sequence_parallel in (False, True):
        layer = ColumnParallelLinear(
            H, OUT, group=group, sequence_parallel=sequence_parallel, bias=True, init=INIT, dtype=DTYPE
        )
        x, grad = full("x", S, B, H), full("grad", S, B, OUT).detach()
        weight, bias = weight_of("linear.weight", OUT, H), torch.zeros(OUT, dtype=DTYPE, requires_grad=True)
        F.linear(x, weight, bias).backward(grad)
        local_x = mine(x, group) if sequence_parallel else x.detach().clone().requires_grad_()
        y = layer(local_x)
        y.backward(mine(grad, group, -1).detach())
        torch.testing.assert_close(y, mine(F.linear(x, weight, bias), group, -1), **CLOSE)
        expected = mine(x.grad, group) if sequence_parallel else x.grad
        torch.testing.assert_close(local_x.grad, expected.detach(), **CLOSE)
        assert_slice(layer.weight.grad, weight.grad, layer.weight.spec)
        assert_slice(layer.bias.grad, bias.grad, layer.bias.spec)


def row_equals_linear(group):
    for sequence_parallel in (False, True):
        layer = RowParallelLinear(
            OUT, H, group=group, sequence_parallel=sequence_parallel, bias=True, init=INIT, dtype=DTYPE
        )
        x, grad = full("x", S, B, OUT), full("grad", S, B, H).detach()
        weight, bias = weight_of("linear.weight", H, OUT), torch.zeros(H, dtype=DTYPE, requires_grad=True)
        expected = F.linear(x, weight, bias)
        expected.backward(grad)
        local_x = mine(x, group, -1)
        y = layer(local_x)
        y.backward(mine(grad, group).detach() if sequence_parallel else grad)
        torch.testing.assert_close(y, mine(expected, group) if sequence_parallel else expected, **CLOSE)
        torch.testing.assert_close(local_x.grad, mine(x.grad, group, -1).detach(), **CLOSE)
        assert_slice(layer.weight.grad, weight.grad, layer.weight.spec)
        torch.testing.assert_close(layer.bias.grad, bias.grad, **CLOSE)


def merged_columns_equal_linears_with_replicas(group):
    """Two KV-like heads over more ranks than heads: replicas hold the same rows and sum their gradients."""
    size, heads = group.size(), min(2, group.size())
    replicas = size // heads
    replica_groups = Topology(size, size).replica_groups(replicas)
    replica_group = None
    for ranks in replica_groups:
        made = dist.new_group(ranks)
        replica_group = made if group.rank() in ranks else replica_group
    columns = [Column("q", OUT), Column("k", heads * 4, replicas)]
    layer = MergedColumnLinear(
        H,
        columns,
        group=group,
        replica_group=replica_group,
        sequence_parallel=True,
        bias=True,
        name="m",
        init=INIT,
        dtype=DTYPE,
    )
    x = full("x", S, B, H)
    grad_q, grad_k = full("gq", S, B, OUT).detach(), full("gk", size, S, B, 4).detach()
    q, k = weight_of("m.q.weight", OUT, H), weight_of("m.k.weight", heads * 4, H)
    twin_k = F.linear(x, k).unflatten(-1, (heads, 4))
    loss = (F.linear(x, q) * grad_q).sum()
    for rank in range(size):  # each rank uses its replica in its own way
        loss = loss + (twin_k[..., rank // replicas, :] * grad_k[rank]).sum()
    loss.backward()
    local_x = mine(x, group)
    y_q, y_k = layer(local_x)
    ((y_q * mine(grad_q, group, -1)).sum() + (y_k * grad_k[group.rank()]).sum()).backward()
    torch.testing.assert_close(local_x.grad, mine(x.grad, group).detach(), **CLOSE)
    assert_slice(layer.q_weight.grad, q.grad, layer.q_weight.spec)
    assert_slice(layer.k_weight.grad, k.grad, layer.k_weight.spec)
    expected_bias = grad_k.reshape(heads, replicas, S * B, 4).sum((1, 2)).flatten()
    assert_slice(layer.k_bias.grad, expected_bias, layer.k_bias.spec)
    assert layer.k_weight.model_parallel == (group.rank() % replicas == 0)


def embedding_equals_embedding(group):
    for sequence_parallel in (False, True):
        layer = VocabParallelEmbedding(
            V, H, group=group, sequence_parallel=sequence_parallel, init=INIT, dtype=DTYPE
        )
        ids = torch.arange(S * B).reshape(S, B) * 7 % V
        grad, table = full("grad", S, B, H).detach(), weight_of("embedding.weight", V, H)
        expected = F.embedding(ids, table)
        expected.backward(grad)
        y = layer(ids)
        y.backward(mine(grad, group).detach() if sequence_parallel else grad)
        torch.testing.assert_close(y, mine(expected, group) if sequence_parallel else expected, **CLOSE)
        assert_slice(layer.weight.grad, table.grad, layer.weight.spec)


def norm_equals_rms_norm(group):
    for sequence_parallel in (False, True):
        layer = ParallelRMSNorm(H, group=group, sequence_parallel=sequence_parallel, dtype=DTYPE)
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


def mappings_are_transposes(group):
    """<f(x), y> summed over ranks equals <x, f'(y)>: the definition of a transpose."""
    size, rank = group.size(), group.rank()
    shapes = [
        (copy_to_tp, (S, B), (S, B), True),
        (reduce_from_tp, (S, B), (S, B), False),
        (gather_sequence, (S // size, B), (S, B), False),
        (scatter_sequence, (S, B), (S // size, B), False),
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
    topology = Topology(group.size(), group.size())
    replicas = kv_replicas(CONFIG.num_key_value_heads, group.size())
    context = ParallelContext.build(topology, group.rank(), torch.device("cpu"), kv_replicas=replicas)
    for sequence_parallel in (False, True):
        layout = StageLayout(context, sequence_parallel, recompute="selective")
        for make in (_attention, _mlp):
            layer, twin = make(layout), make(StageLayout())
            x, grad = full("x", S, B, 16), full("grad", S, B, 16).detach()
            twin(x).backward(grad)
            local_x = mine(x, group) if sequence_parallel else x.detach().clone().requires_grad_()
            layer(local_x).backward(mine(grad, group).detach() if sequence_parallel else grad)
            expected = mine(x.grad, group).detach() if sequence_parallel else x.grad
            torch.testing.assert_close(local_x.grad, expected, **CLOSE)
            for local, whole in zip(layer.parameters(), twin.parameters(), strict=True):
                assert_slice(local.grad, whole.grad, local.spec)


def _attention(layout):
    rotary = RotaryEmbedding(CONFIG)
    return ParallelAttention(CONFIG, rotary, layout, name="a", init=INIT, dtype=DTYPE)


def _mlp(layout):
    return ParallelMLP(CONFIG, layout, name="m", init=INIT, dtype=DTYPE)


CHECKS = [
    column_equals_linear,
    row_equals_linear,
    merged_columns_equal_linears_with_replicas,
    embedding_equals_embedding,
    norm_equals_rms_norm,
    loss_equals_cross_entropy_and_padding_never_counts,
    mappings_are_transposes,
    collectives_write_only_to_their_own,
    attention_and_mlp_equal_one_process,
]


def run_checks(rank):
    for check in CHECKS:
        check(dist.group.WORLD)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_parallel_layers_equal_their_unsharded_twins(world_size):
    run_distributed(run_checks, world_size)


def test_a_parameter_that_does_not_divide_is_refused():
    def body(rank):
        with pytest.raises(ValueError, match=r"size 7 cannot be cut into 2/1 equal pieces"):
            ColumnParallelLinear(4, 7, group=dist.group.WORLD)

    run_distributed(body, 2)


def norm_without_the_sum(group):
    layer = ParallelRMSNorm(H, group=group, sequence_parallel=True, dtype=DTYPE)
    layer.sequence_parallel = False
    x = mine(full("x", S, B, H), group)
    layer(x).sum().backward()
    reference = torch.nn.RMSNorm(H, eps=1e-5, dtype=DTYPE)
    reference(full("x", S, B, H)).sum().backward()
    return torch.allclose(layer.weight.grad, reference.weight.grad)


def test_the_comparison_notices_a_norm_gradient_that_is_not_summed():
    assert not any(run_distributed(lambda rank: norm_without_the_sum(dist.group.WORLD), 2))
