"""Parts that torch.compile makes are the same functions; it is used in training alone, once for a shape."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks

from megalite.kernels.choice import KernelError, Kernels, choose_kernels
from megalite.kernels.compiled import missing_compiler
from megalite.kernels.gating import gate_by_torch
from megalite.kernels.norm import norm_by_rows

CPU = torch.device("cpu")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # fp32, sums in another order
needs_compiler = pytest.mark.skipif(
    missing_compiler(CPU) is not None, reason=f"torch.compile finds no {missing_compiler(CPU)}"
)


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()
    counters.clear()


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def compiled_graphs():
    return counters["stats"]["unique_graphs"]


def parts_and_inputs(kernels: Kernels):
    """Each part with what it takes, [s, b, ...] of a layer."""
    angles = drawn(8, 1, 1, 4, seed=2).detach().repeat(1, 1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    return {
        "norm": (lambda x, weight: kernels.norm(x, weight, 1e-2), (drawn(8, 2, 24), drawn(24, seed=1))),
        "rotation": (lambda x: kernels.rotation(x, cos, sin), (drawn(8, 2, 3, 8),)),
        "gating": (kernels.gating, (drawn(8, 2, 48), drawn(8, 2, 48, seed=1))),
    }


@needs_compiler
def test_compiled_parts_equal_those_that_are_not_in_outputs_and_gradients():
    plain = choose_kernels("auto", "auto", CPU)
    compiled, before = choose_kernels("auto", "auto", CPU, compile_blocks=True), compiled_graphs()
    for _ in range(3):
        for name, (part, inputs) in parts_and_inputs(compiled).items():
            expected, out = parts_and_inputs(plain)[name][0](*inputs), part(*inputs)
            torch.testing.assert_close(out, expected, **CLOSE)
            grad = drawn(*out.shape, seed=4).detach()
            ours, theirs = (torch.autograd.grad(y, inputs, grad) for y in (out, expected))
            torch.testing.assert_close(ours, theirs, **CLOSE)
    assert compiled_graphs() - before == 3  # one for each part, whatever is repeated
    assert not counters["graph_break"]


@needs_compiler
def test_backward_of_a_compiled_gating_computes_silu_again():
    """It holds gate and up; the other one silu(gate) too, as plan/activations.py counts."""

    def numbers_held(kernels):
        held = []
        inputs = parts_and_inputs(kernels)["gating"][1]
        with saved_tensors_hooks(lambda x: held.append(x.numel()), lambda _: None):
            kernels.gating(*inputs)
        return sum(held) // inputs[0].numel()

    assert numbers_held(choose_kernels("auto", "auto", CPU, compile_blocks=True)) == 2
    assert numbers_held(choose_kernels("auto", "auto", CPU)) == 3


@needs_compiler
def test_nothing_is_compiled_where_nothing_is_learnt():
    kernels, before = choose_kernels("auto", "auto", CPU, compile_blocks=True), compiled_graphs()
    with torch.no_grad():
        for length in range(1, 12):
            kernels.gating(drawn(length, 2, 48), drawn(length, 2, 48))
            kernels.norm(drawn(length, 2, 24), drawn(24), 1e-5)
    assert compiled_graphs() == before


@needs_compiler
def test_what_is_named_is_not_compiled():
    kernels = choose_kernels("sdpa", "rows", CPU, gating="torch", compile_blocks=True)
    assert kernels.norm is norm_by_rows and kernels.gating is gate_by_torch
    assert kernels.names.endswith("gating torch, adamw torch, compiled in training: rotation")
    kernels = choose_kernels("auto", "auto", CPU, compile_blocks=True)
    assert kernels.names.endswith(", compiled in training: norm, rotation, gating")


@needs_compiler
def test_experts_whose_tokens_vary_are_not_compiled():
    kernels, before = choose_kernels("auto", "auto", CPU, compile_blocks=True), compiled_graphs()
    for tokens in range(1, 12):
        kernels.expert_gating(drawn(tokens, 48), drawn(tokens, 48))
    assert compiled_graphs() == before


def test_a_machine_without_a_compiler_is_told_in_a_line():
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        with pytest.raises(
            KernelError, match=r"compile_blocks needs a C\+\+ compiler .* on a cpu and finds none"
        ):
            choose_kernels("auto", "auto", CPU, compile_blocks=True)
        assert choose_kernels("auto", "auto", CPU)  # which needs none


def test_a_gpu_without_triton_is_told_in_a_line(monkeypatch):
    monkeypatch.setattr("megalite.kernels.compiled.find_spec", lambda name: None)
    with pytest.raises(KernelError, match="needs the package triton on a cuda and finds none"):
        choose_kernels("auto", "auto", torch.device("cuda"), compile_blocks=True)
