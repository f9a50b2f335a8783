"""Kernels of other packages compute the formula, or are called as they ask for; what lacks is told."""

import ast
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from megalite.kernels.choice import KernelError, Kernels, choose_kernels
from megalite.kernels.gating import GATINGS
from megalite.kernels.norm import NORMS
from megalite.model.llama import LlamaStage
from megalite.parallel.plan import LayerPlan
from tests.foreign_kernels import stand_in_for_ligers_gating, stand_in_for_ligers_norm
from tests.trainers import EXPERTS, SEED, global_batch

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CLOSE = {"rtol": 1e-11, "atol": 1e-12}  # float64, sums in another order


def drawn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def assert_norm_is_torchs(name, dtype, shape, **close):
    x, weight, grad = (drawn(*s, seed=i, dtype=dtype) for i, s in enumerate((shape, shape[-1:], shape)))
    layer = nn.RMSNorm(shape[-1], eps=1e-2, dtype=dtype)  # eps large enough to be noticed
    layer.weight = nn.Parameter(weight.detach())
    y = NORMS[name](x, weight, 1e-2)
    torch.testing.assert_close(y, layer(x), **close)
    expected = torch.autograd.grad(layer(x), (x, layer.weight), grad)
    torch.testing.assert_close(torch.autograd.grad(y, (x, weight), grad), expected, **close)


@pytest.mark.parametrize("shape", [(5, 3, 24), (5, 3, 4, 24)], ids=["features", "heads"])
def test_apexs_norm_on_a_cpu_is_torchs(shape):
    """In fp32: its root is in fp32 for every format."""
    if refusal := _refusal("apex", CPU):
        pytest.skip(refusal)
    assert choose_kernels("auto", "apex", CPU).norm is NORMS["apex"]
    assert_norm_is_torchs("apex", torch.float32, shape, rtol=2e-6, atol=2e-6)


def test_ligers_norm_is_called_for_torchs_numbers(monkeypatch):
    """Through a stand-in, which shows the call and not the kernel. In fp32 to the end, dy left as it is."""
    calls = stand_in_for_ligers_norm(monkeypatch)
    assert_norm_is_torchs("liger", torch.float64, (5, 3, 4, 24), **CLOSE)
    assert calls == [((5, 3, 4, 24), (24,), 1e-2, 0.0, "gemma", False, None)]


def test_ligers_gating_is_called_for_torchs_numbers(monkeypatch):
    """Through a stand-in, which shows the call and not the kernel."""
    calls = stand_in_for_ligers_gating(monkeypatch)
    gate, up, grad = (drawn(5, 3, 8, seed=seed) for seed in range(3))
    results = []
    for name in ("liger", "torch"):
        out = GATINGS[name](gate, up)
        results.append((out, *torch.autograd.grad(out, (gate, up), grad)))
    torch.testing.assert_close(*results, **CLOSE)
    assert calls == [((5, 3, 8), (5, 3, 8))]


def test_all_layers_of_a_model_compute_with_the_kernels_that_are_named(monkeypatch):
    """Norms of 4 layers and the head; gates of one layer's MLP, and in three of experts and shared ones."""
    norms, gates = stand_in_for_ligers_norm(monkeypatch), stand_in_for_ligers_gating(monkeypatch)
    results = []
    gate = GATINGS["liger"]
    for kernels in (Kernels(), Kernels(norm=NORMS["liger"], gating=gate, expert_gating=gate)):
        stage = LlamaStage(EXPERTS, LayerPlan(kernels=kernels), seed=SEED)
        loss = stage(None, global_batch(1))
        results.append((loss, *torch.autograd.grad(loss, list(stage.parameters()))))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert (len(norms), len(gates)) == (2 * 4 + 1, 1 + 2 * 3)


@pytest.mark.parametrize(
    ("file", "function", "taken"),
    [
        ("rms_norm", "LigerRMSNormFunction", "X W eps offset casting_mode in_place row_mode"),
        ("swiglu", "LigerSiLUMulFunction", "a b"),
    ],
)
def test_liger_takes_what_the_stand_ins_take(file, function, taken):
    """As its source says, which can be read without Triton."""
    package = find_spec("liger_kernel")
    if package is None:
        pytest.skip("liger_kernel is not installed: its source cannot be read")
    source = Path(package.submodule_search_locations[0], "ops", f"{file}.py").read_text(encoding="utf-8")
    [owner] = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ClassDef) and n.name == function]
    [forward] = [n for n in owner.body if isinstance(n, ast.FunctionDef) and n.name == "forward"]
    assert [argument.arg for argument in forward.args.args] == ["ctx", *taken.split()]


def test_apex_takes_what_the_stand_in_takes():
    """As its own optimizer calls the kernel."""
    package = find_spec("apex")
    if package is None:
        pytest.skip("apex is not installed: its source cannot be read")
    file = Path(package.submodule_search_locations[0], "optimizers", "fused_adam.py")
    if not file.exists():
        pytest.skip("apex is installed, and not NVIDIA's: its source cannot be read")
    calls = [n for n in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    given = [[ast.unparse(argument) for argument in call.args] for call in calls]
    of_fp32 = [a for a in given if a[:1] == ["self.multi_tensor_adam"] and "g_32" in a[2]]
    group = ["group['lr']", "beta1", "beta2", "group['eps']", "group['step']"]
    settings = ["self.adam_w_mode", "bias_correction", "group['weight_decay']"]
    overflow, lists = "self._dummy_overflow_buf", "[g_32, p_32, m_32, v_32]"
    assert of_fp32 == [["self.multi_tensor_adam", overflow, lists, *group, *settings]]


def _refusal(norm, device, **names):
    try:
        choose_kernels("sdpa", norm, device, **names)
    except KernelError as error:
        return str(error)
    return None


def _install(folder, *modules):
    """Packages that tell when they are imported."""
    for module in modules:
        file = folder.joinpath(*module.split("."), "__init__.py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("raise AssertionError('imported to look for it')")


@pytest.fixture
def nothing_installed(monkeypatch):
    """None of the packages can be found, whatever this machine has."""
    names = ("apex", "amp_C", "fused_layer_norm_cuda", "liger_kernel", "triton")
    without = [f for f in sys.path if not any(any(Path(f).glob(f"{name}*")) for name in names)]
    monkeypatch.setattr(sys, "path", without)
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_missing_package_is_told_with_what_to_install(nothing_installed):
    build = "build it from the sources of github.com/NVIDIA/apex with APEX_CPP_EXT=1 APEX_CUDA_EXT=1"
    need = "needs NVIDIA's apex, which is not installed"
    assert _refusal("apex", CPU) == f"kernels.norm apex {need}: {build}, or set kernels.norm=auto"
    assert _refusal("auto", GPU, adamw="apex") == (
        f"optimizer.implementation apex {need}: {build}, or set optimizer.implementation=auto"
    )
    liger = "needs Liger Kernel, which is not installed: pip install liger-kernel triton"
    assert _refusal("liger", GPU) == f"kernels.norm liger {liger}, or set kernels.norm=auto"
    assert (
        _refusal("auto", GPU, gating="liger") == f"kernels.gating liger {liger}, or set kernels.gating=auto"
    )


def test_what_needs_a_gpu_is_refused_on_a_cpu(nothing_installed, tmp_path, monkeypatch):
    """Installed or not."""
    _install(tmp_path, "liger_kernel.ops", "triton", "apex.optimizers", "amp_C")
    monkeypatch.syspath_prepend(tmp_path)
    assert _refusal("liger", CPU) == (
        "kernels.norm liger needs a GPU and this run is on cpu: set kernels.norm=auto"
    )
    for setting in ({"gating": "liger"}, {"adamw": "apex"}):
        assert "needs a GPU and this run is on cpu" in _refusal("auto", CPU, **setting)
        assert _refusal("auto", GPU, **setting) is None


def test_another_project_of_the_name_apex_is_told_apart_and_not_imported(
    nothing_installed, tmp_path, monkeypatch
):
    _install(tmp_path, "apex.models", "amp_C", "fused_layer_norm_cuda")
    monkeypatch.syspath_prepend(tmp_path)
    for device in (CPU, GPU):
        assert _refusal("apex", device).startswith(
            "kernels.norm apex needs NVIDIA's apex, and the package apex that is installed is another "
            "project, without apex.normalization (pip uninstall apex removes it): build it from the sources"
        )
    assert "another project, without apex.optimizers" in _refusal("auto", GPU, adamw="apex")


def test_apex_without_its_extensions_computes_norms_on_a_cpu_alone(nothing_installed, tmp_path, monkeypatch):
    """As a Python-only build of it is."""
    _install(tmp_path, "apex.normalization", "apex.optimizers")
    monkeypatch.syspath_prepend(tmp_path)
    assert _refusal("apex", CPU) is None
    assert "computes by fused_layer_norm_cuda, and NVIDIA's apex is installed without" in _refusal(
        "apex", GPU
    )
    assert "computes by amp_C, and NVIDIA's apex is installed without" in _refusal("auto", GPU, adamw="apex")
