"""Every kernel that a run can name equals the formula, and the others; what cannot run is refused."""

import inspect
import typing

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megalite.config.kernels import KernelConfig
from megalite.config.optimizer import OptimizerConfig
from megalite.kernels.adamw import ADAMW
from megalite.kernels.attention import ATTENTIONS, attend_by_sdpa
from megalite.kernels.choice import KernelError, Kernels, choose_kernels
from megalite.kernels.gating import GATINGS
from megalite.kernels.norm import NORM_PACKAGES, NORMS, norm_by_rows
from megalite.kernels.products import PRODUCTS
from megalite.kernels.rotation import rotate
from megalite.kernels.sight import Sight

CPU = torch.device("cpu")
CLOSE = {"rtol": 1e-11, "atol": 1e-12}  # float64, sums in another order
STARTS = torch.tensor([[0] * 5 + [5] + [6] * 10, [0] * 16])


def drawn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def stand_in_for_varlen(monkeypatch):
    """Its calls, by the documents' sizes."""
    calls, varlen = [], pytest.importorskip("torch.nn.attention.varlen")

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa):
        assert window_size == (-1, 0) and cu_seq_q is cu_seq_k and cu_seq_q.dtype == torch.int32
        sizes = cu_seq_q.diff().tolist()
        assert cu_seq_q[0] == 0 and sum(sizes) == len(query) and min(sizes) > 0
        assert max(sizes) <= max_q == max_k
        calls.append(sizes)
        documents = zip(*(x.split(sizes) for x in (query, key, value)), strict=True)
        of_heads = [[x.transpose(0, 1)[None] for x in of_one] for of_one in documents]
        out = [
            F.scaled_dot_product_attention(*of_one, is_causal=True, enable_gqa=enable_gqa)
            for of_one in of_heads
        ]
        return torch.cat([x[0].transpose(0, 1) for x in out])

    given = set(inspect.signature(varlen_attn).parameters)
    assert given <= set(inspect.signature(varlen.varlen_attn).parameters)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    return calls


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("sight", [None, Sight.within(STARTS)], ids=["causal", "documents"])
def test_attention_is_the_same_by_every_name(name, sight, monkeypatch):
    """FlexAttention serves GPUs; what it computes is checked here, uncompiled and forward alone.

    FlashAttention has a stand-in, which shows the call: documents one by one, by the formula.
    """
    calls = stand_in_for_varlen(monkeypatch) if name == "varlen" else None
    query, key, value = drawn(2, 4, 16, 8), drawn(2, 2, 16, 8, seed=1), drawn(2, 2, 16, 8, seed=2)
    expected = attend_by_sdpa(query, key, value, sight)
    inputs = (query, key, value)
    out = ATTENTIONS[name](*(x.detach() if name == "flex" else x for x in inputs), sight)
    torch.testing.assert_close(out, expected, **CLOSE)
    assert calls in (None, [] if sight is None else [[5, 1, 10, 16]])
    assert not torch.allclose(out, attend_by_sdpa(query, key, value, Sight.within(STARTS.flip(0))))
    if name != "flex":
        grad = drawn(2, 4, 16, 8, seed=3)
        ours, theirs = (torch.autograd.grad(x, inputs, grad) for x in (out, expected))
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("name", sorted(NORMS.keys() - NORM_PACKAGES.keys()))
@pytest.mark.parametrize("shape", [(5, 3, 24), (5, 3, 4, 24)], ids=["features", "heads"])
def test_norm_equals_torchs_layer(name, shape):
    x, weight, grad = drawn(*shape), drawn(24, seed=1), drawn(*shape, seed=2)
    layer = nn.RMSNorm(24, eps=1e-2, dtype=torch.float64)  # eps large enough to be noticed
    layer.weight = nn.Parameter(weight.detach())
    expected = torch.autograd.grad(layer(x), (x, layer.weight), grad)
    y = NORMS[name](x, weight, 1e-2)
    torch.testing.assert_close(y, layer(x), **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(y, (x, weight), grad), expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_norm_by_rows_is_as_exact_as_torchs(dtype):
    """Errors against float64 at most twice those of torch, which rounds as often; the gradient's mean is far
    from 0, the case where terms that cancel are largest."""
    x, weight = drawn(64, 96, dtype=dtype), (1 + drawn(96, seed=1) / 4).to(dtype).detach().requires_grad_()
    grad = (1 + drawn(64, 96, seed=2)).to(dtype).detach()

    def results(norm, *inputs):
        y = norm(*inputs[:2], 1e-5)
        return [y, *torch.autograd.grad(y, inputs[:2], inputs[2])]

    exact = results(NORMS["torch"], *(t.detach().double().requires_grad_() for t in (x, weight, grad)))
    pairs = zip(results(norm_by_rows, x, weight, grad), results(NORMS["torch"], x, weight, grad), strict=True)
    for (ours, theirs), right in zip(pairs, exact, strict=True):
        error, limit = ((t.double() - right).norm() / right.norm() for t in (ours, theirs))
        assert error < 2 * limit + torch.finfo(torch.float32).eps


def test_heads_turn_in_pairs_half_a_head_apart():
    """As complex numbers (x_j + i x_{j+4}) * exp(i angle), and gradcheck for the opposite turn."""
    x, angles = drawn(5, 2, 3, 8), drawn(5, 2, 1, 4, seed=1).detach()
    turned = torch.complex(*x.detach().chunk(2, -1)) * torch.exp(1j * angles)
    cos, sin = (t.repeat(1, 1, 1, 2) for t in (angles.cos(), angles.sin()))
    torch.testing.assert_close(rotate(x, cos, sin), torch.cat([turned.real, turned.imag], -1), **CLOSE)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), [x])


def test_the_configuration_names_every_kernel():
    fields = [KernelConfig.model_fields[name] for name in ("attention", "norm", "products", "gating")]
    fields.append(OptimizerConfig.model_fields["implementation"])
    for field, table in zip(fields, (ATTENTIONS, NORMS, PRODUCTS, GATINGS, ADAMW), strict=True):
        assert set(typing.get_args(field.annotation)) == {"auto", *table}


def test_auto_is_told_by_the_name_of_what_it_picks():
    of_torch = "products torch, gating torch, adamw torch"
    assert (
        choose_kernels("auto", "auto", CPU, products="torch").names
        == f"attention blocks, norm rows, {of_torch}"
    )
    gpu = torch.device("cuda")
    assert choose_kernels("auto", "auto", gpu).names == f"attention flex, norm torch, {of_torch}"
    plainest = choose_kernels("sdpa", "torch", CPU, products="torch")
    assert plainest.names == f"attention sdpa, norm torch, {of_torch}" == Kernels().names
    assert plainest == Kernels()


def test_a_kernel_that_cannot_train_here_is_refused():
    with pytest.raises(KernelError, match=r"kept_tokens 64 is of .* blocks, and this run has sdpa"):
        choose_kernels("sdpa", "auto", CPU, attention_kept_tokens=64)
    with pytest.raises(KernelError, match=r"varlen needs a GPU .* is on cpu with torch .*: use kernels"):
        choose_kernels("varlen", "auto", CPU)
    with pytest.raises(KernelError, match=r"flex cannot train on a CPU.*use blocks or sdpa"):
        choose_kernels("flex", "auto", CPU)


def test_varlen_wants_a_gpu_that_has_flash_attention(monkeypatch):
    pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(KernelError, match=r"needs a GPU of compute capability 8\.0, .* has 7\.5:"):
        choose_kernels("varlen", "auto", torch.device("cuda"))


def test_probabilities_are_kept_up_to_a_length():
    """What autograd holds for backward: query, key, value, and the probabilities of 16 tokens or not."""
    query, key, value = drawn(2, 4, 16, 8), drawn(2, 2, 16, 8, seed=1), drawn(2, 2, 16, 8, seed=2)

    def numbers_held(kept_tokens):
        held = []
        attention = choose_kernels("auto", "auto", CPU, attention_kept_tokens=kept_tokens).attention
        with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.numel()), lambda _: None):
            attention(query, key, value, None)
        return sum(held)

    assert numbers_held(15) == query.numel() + key.numel() + value.numel()
    assert numbers_held(16) == numbers_held(15) + 2 * 4 * 16 * 16  # one block: 16 rows of 16 keys
