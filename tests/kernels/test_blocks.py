"""Attention in blocks equals attention written out in one line of arithmetic, and all its gradients do.

The reference is a softmax over the whole matrix of scores in float64, masked by comparing places one by one.
In float64 both sides sum the same numbers in another order: 1e-11 is thousands of its roundings, and any
wrong term is larger. Blocks are made small, so that short sequences have many of them.
"""

import pytest
import torch

from megalite.kernels import blocks
from megalite.kernels.blocks import attend_in_blocks, attend_with_lse
from megalite.kernels.sight import Sight

CLOSE = {"rtol": 1e-11, "atol": 1e-12}
LENGTH, HEAD_DIM = 37, 8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 8 * 8)  # 8 rows of float64
    monkeypatch.setattr(blocks, "SCORES_BYTES", 3 * 2 * 8 * 20 * 8)  # some heads in a product, not all


def tensors(heads=4, kv_heads=2, s_q=LENGTH, s_k=None, batch=3, dtype=torch.float64, seed=0):
    """Query, key, value and the output's gradient; the first three laid out as the model's."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(s_q, heads), (s_k or s_q, kv_heads), (s_k or s_q, kv_heads), (s_q, heads)]
    made = [torch.randn(s, batch, n, HEAD_DIM, generator=generator, dtype=torch.float64) for s, n in sizes]
    return [x.to(dtype).permute(1, 2, 0, 3).requires_grad_() for x in made]


def written_out(query, key, value, seen):
    """The output of each query, and its sum of exponentials; seen[b][i][j] says whether it sees a key."""
    key, value = (x.repeat_interleave(query.size(1) // x.size(1), dim=1) for x in (key, value))
    scores = query @ key.mT / query.size(-1) ** 0.5
    exps = scores.exp() * seen.unsqueeze(1)
    total = exps.sum(-1, keepdim=True)
    return exps @ value / total.clamp(min=1e-300), total.squeeze(-1)


def seen_of(query_places, key_places, starts):
    return torch.tensor(
        [
            [[start <= j <= i for j in key_places] for i, start in zip(query_places, of, strict=True)]
            for of in starts
        ]
    )


def gradients(outputs, inputs, grads):
    return torch.autograd.grad(outputs, inputs, grads)


DOCUMENTS = [[0] * LENGTH, [0] * 5 + [5] * 20 + [25] * 12, [0] * 16 + [16] * 8 + [24] + [25] * 12]


@pytest.mark.parametrize("kept_tokens", [0, 512], ids=["again", "kept"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 4), (6, 1)])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["causal", "documents"])
def test_output_and_gradients_equal_those_of_the_formula(heads, kv_heads, documents, kept_tokens):
    *inputs, grad = tensors(heads, kv_heads)
    places = range(LENGTH)
    seen = seen_of(places, places, documents or [[0] * LENGTH] * 3)
    expected, _ = written_out(*inputs, seen)
    sight = Sight.within(torch.tensor(documents)) if documents else None
    out = attend_in_blocks(*inputs, sight, kept_tokens=kept_tokens)
    torch.testing.assert_close(out, expected, **CLOSE)
    for ours, theirs in zip(gradients(out, inputs, grad), gradients(expected, inputs, grad), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


SELECTIONS = {
    "own part": (range(20, 37), range(20, 37)),
    "an earlier part": (range(20, 37), range(20)),
    "a later part": (range(10), range(10, 37)),
    "two chunks": ([*range(8, 16), *range(24, 32)], [*range(8), *range(32, 37)]),
    "all keys": ([*range(5, 9), *range(30, 37)], range(37)),
}


@pytest.mark.parametrize("kept_tokens", [0, 512], ids=["again", "kept"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["causal", "documents"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_queries_and_keys_of_different_places(selection, documents, kept_tokens):
    """Rows that see nothing, and blocks that see nothing, among them; the log-sum-exp has a gradient too."""
    query_places, key_places = SELECTIONS[selection]
    *inputs, grad = tensors(s_q=len(query_places), s_k=len(key_places))
    starts = [[of[i] for i in query_places] for of in documents or [[0] * LENGTH] * 3]
    seen = seen_of(query_places, key_places, starts)
    expected, total = written_out(*inputs, seen)
    places = (torch.tensor([*query_places]), torch.tensor([*key_places]))
    sight = Sight(*places, torch.tensor(starts) if documents else None)
    out, lse = attend_with_lse(*inputs, sight, kept_tokens=kept_tokens)
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(lse, total.log(), **CLOSE)

    def loss(out, lse):
        return (out * grad.detach()).sum() + torch.where(lse.isfinite(), lse, 0).square().sum()

    if not seen.any():
        assert all(not g.any() for g in gradients(loss(out, lse), inputs, None))
        return
    theirs = gradients(loss(expected, torch.where(total > 0, total, 1).log()), inputs, None)
    for ours, their in zip(gradients(loss(out, lse), inputs, None), theirs, strict=True):
        torch.testing.assert_close(ours, their, **CLOSE)


def test_parts_of_the_keys_are_put_together_by_their_log_sum_exps():
    """As context parallelism does: attention to each part, weighed; outputs and gradients of the whole."""
    *inputs, grad = tensors()
    query, key, value = inputs
    starts, places = torch.tensor(DOCUMENTS), torch.arange(LENGTH)
    parts = []
    for part in (slice(0, 9), slice(9, 28), slice(28, LENGTH)):
        sight = Sight(places, places[part], starts)
        parts.append(attend_with_lse(query, key[:, :, part], value[:, :, part], sight))
    outs, lses = (torch.stack(x) for x in zip(*parts, strict=True))
    weights = torch.softmax(lses, 0).unsqueeze(-1)
    merged = (outs * weights).sum(0)
    whole = attend_in_blocks(*inputs, Sight.within(starts))
    torch.testing.assert_close(merged, whole, **CLOSE)
    for ours, theirs in zip(gradients(merged, inputs, grad), gradients(whole, inputs, grad), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_torch_finds_the_same_derivatives_by_differences():
    *inputs, _ = tensors(heads=2, kv_heads=1, s_q=9, batch=1)
    sight = Sight.within(torch.tensor([[0] * 4 + [4] * 5]))
    assert torch.autograd.gradcheck(lambda *x: attend_with_lse(*x, sight), inputs)
    assert torch.autograd.gradcheck(lambda *x: attend_in_blocks(*x, kept_tokens=0), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kept_tokens", [0, 512], ids=["again", "kept"])
def test_it_is_as_exact_as_attention_written_out_in_the_same_format(dtype, kept_tokens, monkeypatch):
    """Errors against float64, in the Frobenius norm, beside those of two products with a softmax in fp32
    between, as transformers writes it: scores and probabilities are rounded to the tensors' format, nothing
    else. A quarter more is allowed for another order of sums; sums over blocks in bf16 would be a multiple.
    In fp32 that order is all there is: one after another 75 blocks cost up to 1.6 times what some CPUs'
    products of a whole row do, and twice as much is allowed.
    """
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4)  # 75 blocks in bf16: many terms in the sums over them
    inputs = tensors(dtype=dtype, s_q=150)
    theirs = _written_in_products(*inputs)
    expected = _written_in_products(*(x.detach().double().requires_grad_() for x in inputs))
    *query_key_value, grad = inputs
    out = attend_in_blocks(*query_key_value, kept_tokens=kept_tokens)
    ours = [out, *gradients(out, query_key_value, grad)]
    for mine, their, right in zip(ours, theirs, expected, strict=True):
        error, limit = ((x.double() - right).norm() / right.norm() for x in (mine, their))
        assert error < (2 if dtype == torch.float32 else 1.25) * limit


def _written_in_products(query, key, value, grad):
    heads, dtype = query.size(1), query.dtype
    keys, values = (x.repeat_interleave(heads // x.size(1), dim=1) for x in (key, value))
    scores = query @ keys.mT * query.size(-1) ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    p = torch.softmax(
        scores.masked_fill(hidden, -torch.inf), -1, dtype=torch.promote_types(dtype, torch.float32)
    )
    out = p.to(dtype) @ values
    return [out, *gradients(out, [query, key, value], grad)]


def test_large_scores_overflow_nowhere():
    query, key, value, grad = tensors(dtype=torch.float32)
    inputs = [(300 * query).detach().requires_grad_(), key, value]
    out, lse = attend_with_lse(*inputs)
    assert all(x.isfinite().all() for x in (out, lse, *gradients(out, inputs, grad)))


def test_without_gradients_nothing_is_kept():
    *inputs, _ = tensors()
    with torch.no_grad():
        out = attend_in_blocks(*inputs)
    assert not out.requires_grad
    torch.testing.assert_close(out, attend_in_blocks(*inputs), rtol=0, atol=0)


def test_the_output_lies_as_the_next_layer_wants_it():
    *inputs, _ = tensors()
    assert attend_in_blocks(*inputs).permute(2, 0, 1, 3).is_contiguous()


def test_blocks_that_nobody_sees_are_not_computed():
    """Documents of one block each are squares on the diagonal; causally only the diagonal is masked."""
    starts = torch.arange(128).div(8, rounding_mode="floor").mul(8).unsqueeze(0)
    planned = Sight.within(starts).blocks(8)
    assert [(block.keys.start, block.keys.stop) for block in planned] == [
        (i, i + 8) for i in range(0, 128, 8)
    ]
    causal = Sight(torch.arange(128), torch.arange(128)).blocks(8)
    assert [block.num_keys for block in causal] == [*range(8, 129, 8)]
    masked = [(hidden.columns.start, hidden.columns.stop) for block in causal for hidden in block.hidden]
    assert masked == [(i + 1, i + 8) for i in range(0, 128, 8)]
