"""The peak speed that utilisation is measured against, and where it comes from."""

import pytest
import torch

from megalite.kernels.products import PRODUCTS, MatrixProducts
from megalite.measure import hardware
from megalite.measure.hardware import known_peak, peak_flops_per_second


@pytest.mark.parametrize(
    ("name", "dtype", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA A100 80GB PCIe", torch.float16, 312),
        ("NVIDIA A100-SXM4-40GB", torch.float32, 19.5),
        ("NVIDIA A10", torch.bfloat16, 125),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("NVIDIA H200", torch.bfloat16, 989),
        ("NVIDIA GB200", torch.bfloat16, 2500),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("Tesla V100-SXM2-32GB", torch.float16, 125),
        ("Tesla V100-PCIE-16GB", torch.float16, 112),
        ("Tesla T4", torch.float32, 8.1),
        ("AMD Instinct MI300X", torch.bfloat16, 1307),
    ],
)
def test_a_gpu_is_known_by_its_name(name, dtype, teraflops):
    peak = known_peak(name, dtype)
    assert peak is not None and peak.flops_per_second == pytest.approx(teraflops * 1e12)
    assert f"{teraflops:g} TFLOP/s" in peak.source and name in peak.source


def test_tf32_counts_only_where_it_is_allowed_and_exists():
    for name, teraflops in (("NVIDIA A100-SXM4-80GB", 156), ("Tesla V100-SXM2-32GB", 15.7)):
        peak = known_peak(name, torch.float32, allow_tf32=True)
        assert peak is not None and peak.flops_per_second == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize("name", ["NVIDIA T400", "NVIDIA GeForce GT 1030", "Some A1000 card"])
def test_a_name_that_only_resembles_a_known_one_is_not_known(name):
    assert known_peak(name, torch.float32) is None


def test_a_number_format_without_tensor_cores_is_not_known():
    assert known_peak("Tesla V100-SXM2-32GB", torch.bfloat16) is None


def test_a_configured_peak_is_taken_at_its_word():
    peak = peak_flops_per_second(torch.device("cpu"), torch.float32, tflops_per_device=1.5)
    assert peak.flops_per_second == 1.5e12 and "1.5 TFLOP/s as configured" in peak.source


def test_a_cpu_is_measured_with_the_threads_in_use():
    peak = peak_flops_per_second(torch.device("cpu"), torch.float32)
    assert 1e9 < peak.flops_per_second < 1e14
    assert "measured with a float32 matrix product" in peak.source
    assert f"on {torch.get_num_threads()} thread" in peak.source


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_cpu_s_peak_is_that_of_the_product_that_layers_take(monkeypatch, name):
    """Else a share of it could exceed one: see docs/performance.md."""
    taken = []

    def watched(left, right):
        taken.append(name)
        return torch.mm(left, right)

    monkeypatch.setitem(hardware.PRODUCTS, name, MatrixProducts(output=watched))
    monkeypatch.setattr(hardware, "products_of", lambda device: name)
    peak_flops_per_second(torch.device("cpu"), torch.float32)
    assert set(taken) == {name}
