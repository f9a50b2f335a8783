"""Run a test's body on several ranks at once: gloo, forked processes, a file store, no ports.

    run_distributed(body, 4, argument, ...)

calls body(rank, argument, ...) in four processes of one gloo world, one thread each, and returns what
each returned. A rank that raises fails the test with its traceback; a world that hangs is ended, with
the stack of every rank.
"""

import faulthandler
import gc
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

# Recomputation imports it, in a second and a half: once here, and not again in each rank that is forked.
import torch._dynamo
import torch.distributed as dist


def run_distributed(
    body: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 120
) -> list[Any]:
    """Results of body(rank, *args) on each rank."""
    fork = multiprocessing.get_context("fork")  # 0.1 s for four ranks, where spawn needs 10 s
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            fork.Process(
                target=_rank_main, args=(body, rank, world_size, Path(folder), timeout_seconds, args)
            )
            for rank in range(world_size)
        ]
        try:
            for process in ranks:
                process.start()
            _join(ranks, timeout_seconds + 10)
        finally:
            _end(ranks)
        return [_result(Path(folder), rank, process) for rank, process in enumerate(ranks)]


def _rank_main(
    body: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: Path,
    timeout_seconds: float,
    args: tuple[Any, ...],
) -> None:
    faulthandler.dump_traceback_later(timeout_seconds, exit=True)
    torch.set_num_threads(1)
    gc.freeze()  # DeepSpeed collects garbage at each engine's birth: not in all that was there before
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )
        outcome: tuple[str, Any] = ("ok", body(rank, *args))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        outcome = ("failed", traceback.format_exc())
    partial = folder / f"result-{rank}.partial"
    partial.write_bytes(pickle.dumps(outcome))
    partial.rename(folder / f"result-{rank}")


def _join(ranks: list[Any], timeout_seconds: float) -> None:
    """Wait for all; when one fails, give the others a moment to say why."""
    patience = timeout_seconds
    pending = list(ranks)
    while pending and patience > 0:
        pending[0].join(0.05)
        patience -= 0.05
        if any(process.exitcode for process in ranks):
            patience = min(patience, 5)
        pending = [process for process in pending if process.is_alive()]


def _end(ranks: list[Any]) -> None:
    """Also where somebody interrupts the test: none is to stay behind."""
    for process in ranks:
        if process.is_alive():
            process.kill()
            process.join()


def _result(folder: Path, rank: int, process: Any) -> Any:
    path = folder / f"result-{rank}"
    if not path.exists():
        raise AssertionError(f"rank {rank} gave no result (exit code {process.exitcode})")
    status, value = pickle.loads(path.read_bytes())
    if status == "failed":
        raise AssertionError(f"rank {rank} failed:\n{value}")
    return value
