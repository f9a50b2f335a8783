"""The peak speed of a device: what model FLOPs utilisation is measured against."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megalite.kernels.products import PRODUCTS, Product, products_of

# Dense matrix products, without structured sparsity (data sheets often print twice that), in TFLOP/s. "half"
# is both bf16 and fp16 with fp32 sums. The first name that is a word of the device's name counts.
# Sources: NVIDIA data sheets of V100, T4, A100, A30, A40, A10, A10G, L4, L40, L40S, H100, H200, H20, GH200,
# HGX B200 and GB200 NVL72; AMD's of Instinct MI300X.
PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "GB200": {"half": 2500, "tf32": 1250, "fp32": 80},
    "B200": {"half": 2250, "tf32": 1100, "fp32": 75},
    "GH200": {"half": 989, "tf32": 494, "fp32": 67},
    "H200": {"half": 989, "tf32": 494, "fp32": 67},
    "H100 NVL": {"half": 835, "tf32": 417, "fp32": 60},
    "H100 PCIe": {"half": 756, "tf32": 378, "fp32": 51},
    "H100": {"half": 989, "tf32": 494, "fp32": 67},
    "H800": {"half": 989, "tf32": 494, "fp32": 67},
    "H20": {"half": 148, "tf32": 74, "fp32": 44},
    "A100": {"half": 312, "tf32": 156, "fp32": 19.5},
    "A800": {"half": 312, "tf32": 156, "fp32": 19.5},
    "A40": {"half": 149.7, "tf32": 74.8, "fp32": 37.4},
    "A30": {"half": 165, "tf32": 82, "fp32": 10.3},
    "A10G": {"half": 70, "tf32": 35, "fp32": 31.5},
    "A10": {"half": 125, "tf32": 62.5, "fp32": 31.2},
    "L40S": {"half": 362, "tf32": 183, "fp32": 91.6},
    "L40": {"half": 181, "tf32": 90.5, "fp32": 90.5},
    "L4": {"half": 121, "tf32": 60, "fp32": 30.3},
    "V100-PCIE": {"fp16": 112, "fp32": 14},  # no tensor cores for bf16 or tf32
    "V100": {"fp16": 125, "fp32": 15.7},
    "T4": {"fp16": 65, "fp32": 8.1},
    "MI300X": {"half": 1307, "tf32": 654, "fp32": 163},
}
MEASURE_SECONDS = 0.1  # at each size
MEASURE_SIZES = (
    256,
    512,
    1024,
    2048,
    4096,
    8192,
)  # square matrices, as far as one product fits into the time


@dataclass(frozen=True)
class PeakSpeed:
    """The peak of one device for one number format, and where the number comes from."""

    flops_per_second: float
    source: str


def peak_flops_per_second(
    device: torch.device, dtype: torch.dtype, tflops_per_device: float | None = None
) -> PeakSpeed:
    """The peak of this process's device for matrix products in `dtype`, dense.

    `tflops_per_device`, if given, is taken at its word. A known GPU has its data sheet's number. Everything
    else, a CPU first of all, is measured for a third of a second. Ranks that share cores share their speed:
    to know that of a machine, call this on all its ranks at the same time, and add.
    """
    if tflops_per_device is not None:
        return PeakSpeed(tflops_per_device * 1e12, f"{tflops_per_device:g} TFLOP/s as configured")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = known_peak(name, dtype, torch.backends.cuda.matmul.allow_tf32)
        if known is not None:
            return known
    return _measure(device, dtype)


def known_peak(device_name: str, dtype: torch.dtype, allow_tf32: bool = False) -> PeakSpeed | None:
    """The data sheet's number for a GPU by its name; None if the name or its number format is not listed."""
    listed = next((row for name, row in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device_name)), {})
    if dtype == torch.bfloat16 or (dtype == torch.float16 and "half" in listed):
        unit = "half"
    elif dtype == torch.float16:
        unit = "fp16"
    else:
        unit = "tf32" if allow_tf32 and "tf32" in listed else "fp32"
    if unit not in listed:
        return None
    spoken = str(dtype).removeprefix("torch.") if unit == "half" else unit
    source = f"{listed[unit]:g} TFLOP/s dense {spoken} by the data sheet of {device_name}"
    return PeakSpeed(listed[unit] * 1e12, source)


def _measure(device: torch.device, dtype: torch.dtype) -> PeakSpeed:
    flops_per_second = max(_measured_speeds(device, dtype))
    where = f"on {torch.get_num_threads()} thread(s)" if device.type == "cpu" else f"on {device}"
    spoken = str(dtype).removeprefix("torch.")
    source = f"{flops_per_second / 1e12:.3g} TFLOP/s measured with a {spoken} matrix product {where}"
    return PeakSpeed(flops_per_second, source)


def _measured_speeds(device: torch.device, dtype: torch.dtype) -> Iterator[float]:
    """The best speed at each size, in FLOP/s, of the product that linear layers take by default."""
    multiply = PRODUCTS[products_of(device)].output
    for size in MEASURE_SIZES:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds: list[float] = []
        give_up_at = time.perf_counter() + MEASURE_SECONDS
        while not seconds or time.perf_counter() < give_up_at:
            seconds.append(_timed_product(multiply, left, right))
        yield 2 * size**3 / min(seconds)
        if 8 * min(seconds) > MEASURE_SECONDS:
            return


def _timed_product(multiply: Product, left: torch.Tensor, right: torch.Tensor) -> float:
    started = time.perf_counter()
    multiply(left, right)
    if left.is_cuda:
        torch.cuda.synchronize(left.device)
    return time.perf_counter() - started
