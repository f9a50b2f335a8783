"""One rank's device: whether it is there, free, counts right, and how fast."""

import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Multiply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

SIZES = {"cuda": 4096, "cpu": 256}  # rows of the square matrices that are multiplied
BAND = 256  # a row's numbers that are not zero: sums stay whole numbers that bf16 holds exactly
TIMED_SECONDS, LEAST_TIMED = 0.3, 10  # for products, and how many at least: the best one counts
LEAST_FREE = 0.9  # of a GPU's memory, before anything is on it
NVIDIA_SMI_SECONDS = 20


@dataclass(frozen=True)
class Product:
    """A matrix product: whether it is right, and its best speed."""

    is_right: bool
    flops_per_second: float


def measure_product(device: torch.device, dtype: torch.dtype, multiply: Multiply = torch.mm) -> Product:
    """Multiply matrices of -1, 0 and 1 for a moment, and check the first product and the last.

    The product C = A B is exact in every format, and C r for whole numbers r in fp64: it must be A (B r),
    which the CPU computes (Freivalds' check: one wrong element does not get past an r without a zero).
    """
    size = SIZES[device.type]
    left, right, vector = draw_factors(size)
    expected = left.double() @ (right.double() @ vector)
    x, y, r = (tensor.to(device) for tensor in (left.to(dtype), right.to(dtype), vector))
    is_right = torch.equal((multiply(x, y).double() @ r).cpu(), expected)
    seconds: list[float] = []
    give_up_at = time.perf_counter() + TIMED_SECONDS
    while len(seconds) < LEAST_TIMED or time.perf_counter() < give_up_at:
        started = time.perf_counter()
        product = multiply(x, y)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    is_right = is_right and torch.equal((product.double() @ r).cpu(), expected)
    return Product(is_right, 2 * size**3 / min(seconds))


def draw_factors(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A and B, int8, the same on every rank, A with BAND numbers a row; and r, fp64 `[size, 1]`."""
    generator = torch.Generator().manual_seed(size)
    drawn = [torch.randint(-1, 2, (size, size), generator=generator, dtype=torch.int8) for _ in range(2)]
    place = torch.arange(size)
    vector = torch.randint(1, 8, (size, 1), generator=generator).double()
    return drawn[0] * ((place - place[:, None]) % size < BAND), drawn[1], vector


def memory_problem(free_bytes: int, total_bytes: int) -> str | None:
    """Why a GPU has too little memory for a run that is to have it for itself."""
    if free_bytes >= LEAST_FREE * total_bytes:
        return None
    return f"{free_bytes / 1e9:.1f} of {total_bytes / 1e9:.1f} GB are free: another process holds the rest"


def ecc_problem(device: torch.device) -> str | None:
    """Memory errors that a GPU could not correct since it was last reset, as nvidia-smi counts them.

    None where it cannot be asked: it is not installed, or does not know the device (a part of a GPU).
    """
    program = shutil.which("nvidia-smi")
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if program is None or uuid is None:
        return None
    query = "--query-gpu=ecc.errors.uncorrected.volatile.total"
    command = [program, f"--id=GPU-{str(uuid).removeprefix('GPU-')}", query, "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS)
    except subprocess.TimeoutExpired:
        return f"nvidia-smi gives no answer in {NVIDIA_SMI_SECONDS} s"
    return ecc_of(done.stdout) if done.returncode == 0 else None


def ecc_of(answer: str) -> str | None:
    """What nvidia-smi's answer says: a count, or [N/A] where the GPU keeps none."""
    count = answer.strip()
    has_errors = count.isdecimal() and int(count) > 0
    return f"{count} memory errors that ECC could not correct: it needs a reset" if has_errors else None
