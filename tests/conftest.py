"""What all tests share: one thread a process, no reach outside this machine, and nothing left behind."""

import os
import signal
import warnings
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# torch.compile's pool of threads would not survive the fork of ranks, which would wait for it.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch
import torch.distributed as dist

# What makes a process a rank: other libraries look for these, and begin a process group where they are.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
for variable in RANK_VARIABLES:
    os.environ.pop(variable, None)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background: children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # ranks are forked: a thread pool in the parent would not survive it


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-slurm", action="store_true", help="fail where Slurm's packages are missing")


@pytest.fixture(autouse=True)
def no_rank() -> Iterator[None]:
    """A test that leaves this process a rank would fail all that fork ranks after it: it is told instead."""
    yield
    left = [variable for variable in RANK_VARIABLES if os.environ.pop(variable, None) is not None]
    if dist.is_initialized():
        dist.destroy_process_group()
        left.append("a process group")
    if left:
        warnings.warn(f"left behind, and taken away: {', '.join(left)}", stacklevel=1)
