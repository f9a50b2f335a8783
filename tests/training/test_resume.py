"""Whatever ended a run, in whatever layout, it goes on bit for bit: losses, and all state on every rank.

One run of each layout and ZeRO stage dies between two saves, is stopped by a signal, then by its minutes, and
goes on to its end, once with saves at once and once with saves beside the training; on four ranks and more in
one of these ways, by turns. Deaths are real in tests/chaos; here the engine is dropped within a step and a
new one begins, so that all runs of a world need one start.
"""

import hashlib
import itertools
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalite.batch import Batch
from megalite.config.checkpoint import CheckpointConfig
from megalite.config.schedule import ScheduleConfig
from megalite.parallel.context import ParallelContext
from megalite.training.checkpoints import Checkpoints, live_pieces
from megalite.training.course import Course
from megalite.training.data import Data
from megalite.training.engine import initialize_communication
from megalite.training.guard import Guard
from megalite.training.loop import train
from megalite.training.node_disk import open_disk
from megalite.training.saving import Saving
from megalite.training.stopping import Signals, Stopping
from megalite.training.trainer import StageTrainer, build_context
from megalite.watch.marks import Marks
from tests.harness import run_distributed
from tests.trainers import BATCH, Case, deepspeed_of, global_batch, run_config

NUM_STEPS, SAVE_EVERY, NUM_MICRO_BATCHES = 5, 2, 2
LAYOUTS = list(itertools.product((1, 2), repeat=3))
SIGNALLED_RANK_OF = {1: 0, 2: 1, 4: 2, 8: 5}
# life -> what ends it, and where the next one is to begin
ENDS = {"death": (3, 2), "signal": (3, 3), "minutes": (4, 4), "its end": (None, 5)}


class Death(BaseException):
    """Stands for that of all processes: nothing handles it."""


@dataclass
class Losses:
    """In the place of the run's record: each step's numbers, of the life that came last."""

    rows: dict[int, tuple[float, float, float]] = field(default_factory=dict)

    def record(self, *, step: int, loss: float, grad_norm: float, learning_rate: float, **_: Any) -> None:
        self.rows[step] = loss, grad_norm, learning_rate


class Ending:
    """The data of a run, and what happens while the batch of a step is read."""

    def __init__(self, context: ParallelContext, signals: Signals, end: str) -> None:
        self._context, self._signals, self._end = context, signals, end

    def batch(self, consumed_samples: int) -> list[Batch]:
        step, rank = 1 + consumed_samples // BATCH, dist.get_rank()
        if self._end == "death" and step == ENDS["death"][0]:
            raise Death
        is_signalled = rank == SIGNALLED_RANK_OF[dist.get_world_size()]
        if self._end == "signal" and step == ENDS["signal"][0] and is_signalled:
            signal.raise_signal(signal.SIGTERM)
        data = self._context["dp"]
        return global_batch(step).split(data.size)[data.rank].split(NUM_MICRO_BATCHES)


def hash_state(trainer: StageTrainer) -> str:
    """Of every number that a rank holds: weights, masters, moments."""
    digest = hashlib.sha256()
    for piece in live_pieces(trainer.engine):
        digest.update(repr((piece.kind, piece.name, piece.region)).encode())
        digest.update(piece.tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def live(
    rank: int,
    case: Case,
    folder: Path,
    losses: Losses,
    end: str,
    *,
    node: str = "",
    report: Callable[[str], None] = lambda text: None,
    **settings: Any,
) -> tuple[int, str]:
    """From the newest checkpoint until something ends the run; the step before, and the state after.

    node: that the rank is on.
    """
    checkpoint = CheckpointConfig(**{"save_every_steps": SAVE_EVERY, **settings})
    schedule = ScheduleConfig(num_steps=NUM_STEPS, warmup_steps=2)
    model = case.model.model_copy(update={"num_hidden_layers": 2})
    run = run_config(case, output_dir=str(folder), checkpoint=checkpoint, schedule=schedule, model=model)
    deepspeed = deepspeed_of(case, NUM_MICRO_BATCHES)
    signals = Signals()
    context = build_context(run, rank, case.world_size, torch.device("cpu"))
    minutes = 1.0 if end == "minutes" else None  # which are over when it begins: it takes one step
    stopping = Stopping(folder, minutes, signals, context.device, time.monotonic() - 61)
    disk = open_disk(run, rank, node)
    checkpoints = Checkpoints(run, deepspeed, rank, report, disk=disk)
    course = Course.after(checkpoints.look(), BATCH)
    trainer = StageTrainer(run, deepspeed, context)
    assert checkpoints.resume(trainer.engine) == course.step
    saving, guard = Saving(checkpoints, checkpoint, report), Guard(run.guard, print)
    data = Data(Ending(context, signals, end), None, {})
    record: Any = losses
    try:
        request = train(trainer, data, run, course, guard, saving, stopping, record, mark=Marks("start-up"))
    except Death:
        saving.finish()  # what was begun was written: others die in the middle of that, see tests/chaos
        return course.step, ""
    reasons = {"signal": "SIGTERM", "minutes": "stop.after_minutes"}
    assert (request.reason if request else "its end") == reasons.get(end, "its end")
    return course.step, hash_state(trainer)


def resume_in_all_ways(rank: int, cases: list[Case], folder: Path) -> list[str]:
    """What differs, of each case, from the run that is never interrupted."""
    initialize_communication()
    wrong = []
    for number, case in enumerate(cases):
        whole = Losses()
        _, expected = live(rank, case, folder / f"whole-{number}", whole, "its end", asynchronous=False)
        assert len(whole.rows) == NUM_STEPS
        for beside in (False, True) if case.world_size <= 2 else (number % 2 == 0,):
            losses, started_after = Losses(), []
            for end in ENDS:
                run_dir = folder / f"ended-{number}-{beside}"
                step, state = live(rank, case, run_dir, losses, end, asynchronous=beside)
                started_after.append(step)
            assert started_after == [0, *(step for _, step in ENDS.values())][:-1]
            manner = f"{case}, {'beside' if beside else 'at once'}"
            if losses.rows != whole.rows:
                wrong.append(f"{manner}: losses")
            if state != expected:
                wrong.append(f"{manner}: state")
    return wrong


@pytest.mark.timeout(600)
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_a_run_goes_on_bit_for_bit_after_death_a_signal_and_its_minutes(world_size, tmp_path):
    layouts = [layout for layout in LAYOUTS if layout[0] * layout[1] * layout[2] == world_size]
    cases = [Case(tp=tp, pp=pp, dp=dp, zero=zero) for zero in range(4) for tp, pp, dp in layouts]
    found = run_distributed(resume_in_all_ways, world_size, cases, tmp_path, timeout_seconds=550)
    assert found == [[]] * world_size
