"""Bodies that run on the ranks of a gloo world of this machine, each in a new process of one thread."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

from megalite.training.environment import choose_cpu_accelerator

PATIENCE = timedelta(minutes=5)  # for a rank that others wait for


def in_world(size: int, body: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What body(*arguments), a module's function, returns on each of `size` ranks."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(size, spawn) as pool:
        store = f"file://{Path(folder, 'store')}"
        ranks = [pool.submit(_as_rank, rank, size, store, body, *arguments) for rank in range(size)]
        return [rank.result() for rank in ranks]


def _as_rank(rank: int, size: int, store: str, body: Callable[..., Any], *arguments: Any) -> Any:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    choose_cpu_accelerator()
    import torch
    import torch.distributed as dist

    from megalite.training.engine import initialize_communication

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=PATIENCE)
    with redirect_stdout(None):  # DeepSpeed tells of memory
        initialize_communication()
        result = body(*arguments)
    dist.destroy_process_group()
    return result
