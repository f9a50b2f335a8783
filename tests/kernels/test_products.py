"""Matrix products of linear layers against float64, in all the layouts in which tensors come."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from megalite.kernels import products
from megalite.kernels.choice import KernelError, choose_kernels
from megalite.kernels.products import PRODUCTS, has_onednn, products_of

CPU = torch.device("cpu")
ROUNDING = 2e-6  # of sums of at most 40 products of numbers of size 1, in fp32


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


INPUTS = {  # [..., 16] each
    "plain": drawn(5, 2, 16),
    "transposed": drawn(16, 10).T,
    "of another order": drawn(2, 5, 16).transpose(0, 1),
    "a slice": drawn(5, 2, 40)[..., 3:19],
    "expanded": drawn(1, 1, 1).expand(5, 2, 16),
    "one row": drawn(1, 1, 16),
    "no row": drawn(0, 2, 16),
}
WEIGHTS = {  # [24, 16] each
    "plain": drawn(24, 16, seed=1),
    "within a flat buffer": drawn(24 * 16 + 1, seed=1)[1:].view(24, 16),
    "a slice": drawn(24, 40, seed=1)[:, 3:19],
}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("name", PRODUCTS if has_onednn() else ["torch"])
def test_products_equal_sums_in_float64(name, x, weight):
    made = PRODUCTS[name]
    y, wide, wide_weight = made.output(x, weight), x.double(), weight.double()
    grad = torch.cos(y)
    cases = [
        (y, torch.einsum("...i,oi->...o", wide, wide_weight)),
        (made.input_gradient(grad, weight), torch.einsum("...o,oi->...i", grad.double(), wide_weight)),
        (made.weight_gradient(grad, x), torch.einsum("...o,...i->oi", grad.double(), wide)),
    ]
    for result, expected in cases:
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), expected, rtol=ROUNDING, atol=10 * ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_formats_than_fp32_are_torchs(dtype):
    x, weight, grad = drawn(5, 2, 16).to(dtype), drawn(24, 16).to(dtype), drawn(5, 2, 24).to(dtype)
    for inputs in ({"output": (x, weight)}, {"input_gradient": (grad, weight)}):
        for product, tensors in inputs.items():
            of_both = [getattr(PRODUCTS[name], product)(*tensors) for name in PRODUCTS]
            assert torch.equal(*of_both)


def test_no_input_features_give_zeros():
    """The share of a rank that has none of a layer's input."""
    x, weight = drawn(5, 2, 0), drawn(24, 0)
    assert torch.equal(PRODUCTS["onednn"].output(x, weight), torch.zeros(5, 2, 24))


@pytest.mark.skipif(not has_onednn(), reason="this torch has no oneDNN")
def test_onednn_multiplies_where_it_is_asked(monkeypatch):
    """Not the other by accident: with a broken oneDNN both products are broken, the third is not."""
    monkeypatch.setattr(products, "_by_onednn", lambda x, weight: (x @ weight.T).fill_(7))
    x, weight, grad = drawn(5, 2, 16), drawn(24, 16), drawn(5, 2, 24)
    made = PRODUCTS["onednn"]
    assert (made.output(x, weight) == 7).all() and (made.input_gradient(grad, weight) == 7).all()
    assert not (made.weight_gradient(grad, x) == 7).any()
    assert len(fields(made)) == 3


@pytest.mark.skipif(not has_onednn(), reason="this torch has no oneDNN")
def test_auto_is_onednn_on_an_amd_cpu_only(monkeypatch):
    for vendor, name in (("AuthenticAMD", "onednn"), ("GenuineIntel", "torch")):
        monkeypatch.setattr(Path, "read_text", lambda path, vendor=vendor: f"vendor_id\t: {vendor}\n")
        monkeypatch.setattr(Path, "exists", lambda path: True)
        assert products_of(CPU) == name
        assert choose_kernels("auto", "auto", CPU).products is PRODUCTS[name]
    monkeypatch.setattr(Path, "exists", lambda path: False)  # a system without the file
    assert products_of(CPU) == "torch"
    assert products_of(torch.device("cuda")) == products_of(torch.device("meta")) == "torch"


def test_onednn_elsewhere_than_on_a_cpu_is_refused():
    with pytest.raises(KernelError, match=r"onednn needs a CPU .* on a cuda: set kernels.products=torch"):
        choose_kernels("auto", "auto", torch.device("cuda"), products="onednn")
