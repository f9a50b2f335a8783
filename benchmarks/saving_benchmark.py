"""Checkpoints of the 39M model in training, on two data-parallel ranks of a CPU under ZeRO-1 in fp32, beside
a plain write and sync, or read, of as many bytes by as many processes, in turns. The stall is what training
waits for a save that is written beside it, here also as a share of a step of 8 samples of 512 tokens; host
memory is the copy that the save is written from. The last row is guard.check_copies_every_steps, done once.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measurement import Measurement, middle_half
from benchmarks.world import in_world

TITLE = "Checkpoints of a run"
PEER = "plain write or read"
ROOT = Path(__file__).resolve().parents[1]
NUM_RANKS, SAMPLES_PER_RANK, NUM_ROUNDS = 2, 4, 5
WRITE_AT_ONCE_BYTES = 1 << 22
DEEPSPEED = {
    "train_batch_size": NUM_RANKS * SAMPLES_PER_RANK,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 1},
}


def measure() -> list[Measurement]:
    """Train and save in two processes; the rows of the table, over the rounds of rank 0."""
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:  # on the disk, where /tmp may be memory
        found = in_world(NUM_RANKS, train_and_save, folder)[0]
    rounds, size_bytes, copy_bytes = found["rounds"], found["size_bytes"], found["copy_bytes"]
    stall = [one["stall"] for one in rounds]
    shares = [100 * one["stall"] / one["step"] for one in rounds]
    slower = [100 * (one["step beside a save"] / one["step"] - 1) for one in rounds]
    checks = [100 * one["check"] / one["step"] for one in rounds]

    def against_plain(name: str, ours: str, theirs: str) -> Measurement:
        ratios = [one[theirs] / one[ours] for one in rounds]
        our_speed, plain_speed = (
            size_bytes / 1e6 / median(one[key] for one in rounds) for key in (ours, theirs)
        )
        return Measurement(name, "MB/s", our_speed, plain_speed, spread=middle_half(ratios))

    def alone(name: str, unit: str, values: list[float]) -> Measurement:
        return Measurement(name, unit, median(values), higher_is_better=False, spread=middle_half(values))

    return [
        against_plain("save, training waits", "save", "write"),
        against_plain("load, in the page cache, checksums verified", "load", "read"),
        alone("stall of a save beside the training", "seconds", stall),
        alone("the same, of a step", "%", shares),
        alone("steps that a save is written beside, longer by", "%", slower),
        Measurement("host memory of a rank for it", "MB", copy_bytes / 1e6, higher_is_better=False),
        alone("comparing all copies once, of a step", "%", checks),
    ]


def train_and_save(folder: str) -> dict[str, Any]:
    """On one rank: seconds of each thing, round by round."""
    import torch
    import torch.distributed as dist

    from megalite.checkpoint.load import find_checkpoint
    from megalite.config.deepspeed import load_deepspeed
    from megalite.config.load import load_run
    from megalite.training.checkpoints import Checkpoints
    from megalite.training.saving import HostCopy, Saving
    from megalite.training.trainer import StageTrainer, build_context
    from megalite.training.world import gather

    rank, where = dist.get_rank(), Path(folder)
    run, deepspeed = _configure(where, load_run, load_deepspeed)
    trainer = StageTrainer(run, deepspeed, build_context(run, rank, NUM_RANKS, torch.device("cpu")))
    checkpoints = Checkpoints(run, deepspeed, rank, lambda line: None)
    settings = run.checkpoint
    beside = Saving(checkpoints, settings, lambda line: None)
    batches = _batches(rank, run)

    def step() -> None:
        trainer.train_step(batches, 1e-4)

    def seconds(body: Callable[[], object]) -> float:
        os.sync()
        dist.barrier()
        started = time.perf_counter()
        body()
        dist.barrier()
        return time.perf_counter() - started

    step()
    pieces = checkpoints.capture(trainer.engine, 1).pieces
    owned_bytes = sum(piece.tensor.nbytes for piece in pieces if piece.owned)
    copy_bytes = sum(piece.tensor.nbytes for piece in HostCopy().of(pieces) if piece.owned)
    beside.save(trainer.engine, 1)  # takes its memory
    beside.finish()
    block = torch.randn(WRITE_AT_ONCE_BYTES // 4).numpy().data.cast("B")
    plain, rounds = where / f"plain-{rank}", []
    for number in range(2, NUM_ROUNDS + 2):
        one = {"step": seconds(step)}
        one["write"] = seconds(lambda: _write(plain, block, owned_bytes))
        one["read"] = seconds(lambda: _read(plain))
        one["save"] = seconds(partial(checkpoints.save, trainer.engine, number))
        one["load"] = seconds(lambda: checkpoints.resume(trainer.engine))
        beside.save(trainer.engine, number)
        one["stall"] = beside.metrics()["save_stall_seconds"]
        one["step beside a save"] = seconds(step)
        beside.finish()
        one["check"] = seconds(partial(trainer.copies.check, number))
        rounds.append(one)
    assert find_checkpoint(checkpoints.root, rank=rank, world_size=NUM_RANKS, gather=gather)
    return {"rounds": rounds[1:], "size_bytes": sum(gather(owned_bytes)), "copy_bytes": copy_bytes}


def _configure(folder: Path, load_run: Callable[..., Any], load_deepspeed: Callable[..., Any]) -> Any:
    file = folder / f"deepspeed-{os.getpid()}.json"
    file.write_text(json.dumps(DEEPSPEED), encoding="utf-8")
    overrides = [f"output_dir={folder}/run", "checkpoint.keep_last=2"]
    run = load_run(ROOT / "configs/runs/lillm_39m.yaml", overrides, file)
    return run, load_deepspeed(file, "the run", dp_size=NUM_RANKS, hidden_size=run.model.hidden_size)


def _batches(rank: int, run: Any) -> list[Any]:
    import torch

    from megalite.batch import Batch

    generator = torch.Generator().manual_seed(rank)
    shape = (SAMPLES_PER_RANK, run.data.seq_length + 1)
    ids = torch.randint(run.model.vocab_size, shape, generator=generator)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).split(SAMPLES_PER_RANK)


def _write(path: Path, block: memoryview, size_bytes: int) -> None:
    with path.open("wb") as file:
        for start in range(0, size_bytes, len(block)):
            file.write(block[: size_bytes - start])
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(WRITE_AT_ONCE_BYTES)
        while file.readinto(buffer):
            pass
