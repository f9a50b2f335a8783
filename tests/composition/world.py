"""A composition on four ranks: all that a run may meet between two steps happens, and must change nothing.

begin    step 0   validate, ask for logits, refuse a step, save   step 1, while it is written
go on                                  another layout: resume     step 1   step 2
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import nan
from pathlib import Path
from threading import Event
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from megalite.batch import Batch
from megalite.config.checkpoint import CheckpointConfig
from megalite.config.guard import GuardConfig
from megalite.training.checkpoints import Checkpoints, find_newest
from megalite.training.engine import initialize_communication
from megalite.training.guard import Guard
from megalite.training.live_model import LiveModel
from megalite.training.node_disk import open_disk
from megalite.training.saving import Saving
from megalite.training.trainer import StageTrainer, build_context
from tests.composition.compositions import WORLD_SIZE, ChatBatches, Composition, base_of, parts_of
from tests.reference import learning_rate_of
from tests.test_lora_equivalence import fill_adapters
from tests.trainers import MODEL, SEQ_LENGTH, Case

SAVED, NUM_STEPS = 1, 3
PROMPTS = torch.randint(MODEL.vocab_size, (2, SEQ_LENGTH), generator=torch.Generator().manual_seed(8))


@dataclass
class Told:
    """Of one rank: losses and norms of the steps that each layout took, and what happened between.

    verdicts: of the guard on the step that was not to be taken. logits: on rank 0. loss_scales: of fp16, at
    first, when it was saved, and when the other layout had resumed.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    validation: float = nan
    verdicts: list[str] = field(default_factory=list)
    logits: torch.Tensor | None = None
    resumed_from: list[int] = field(default_factory=list)
    loss_scales: list[float] = field(default_factory=list)


def run_all(rank: int, compositions: Sequence[Composition], chats: ChatBatches, root: Path) -> list[Told]:
    initialize_communication()
    get_accelerator().is_fp16_supported = lambda: True  # torch computes in it; DeepSpeed asks for fast CPUs
    found = []
    for number, composition in enumerate(compositions):
        told = Told()
        places = {"folder": root / f"run-{number}", "start": root / "start"}
        _Half(rank, composition, composition.before, told, chats, **places).begin()
        _Half(rank, composition, composition.after, told, chats, **places).go_on()
        found.append(told)
    return found


class _Half:
    """One layout's part of a run."""

    def __init__(
        self,
        rank: int,
        composition: Composition,
        case: Case,
        told: Told,
        chats: ChatBatches,
        *,
        folder: Path,
        start: Path,
    ) -> None:
        self.composition, self.case, self.told, self.chats = composition, case, told, chats
        base = start / base_of(composition) if composition.lora else None
        settings = CheckpointConfig(
            local_dir=str(folder / "disk"), save_every_steps=SAVED, start_from=base and str(base)
        )
        run = composition.run(case, checkpoint=settings, output_dir=str(folder))
        deepspeed = composition.deepspeed(case)
        context = build_context(run, rank, case.world_size, torch.device("cpu"))
        disk = open_disk(run, rank, "node")
        newest = find_newest(run, rank, _nobody, disk)
        self.trainer = StageTrainer(run, deepspeed, context)
        checkpoints = Checkpoints(run, deepspeed, rank, _nobody, newest=newest, disk=disk)
        told.resumed_from.append(checkpoints.resume(self.trainer.engine))
        self.saving = Saving(checkpoints, run.checkpoint, _nobody)
        self.may_write, write = Event(), checkpoints.write

        def write_late(*arguments: Any, **options: Any) -> Path:
            self.may_write.wait(120)  # seconds: where a step fails, nobody is to wait for ever
            return write(*arguments, **options)

        checkpoints.write = write_late  # type: ignore[method-assign]
        self.guard = Guard(GuardConfig(), _nobody, scales_loss=case.precision == "fp16")

    def begin(self) -> None:
        """From the start to the save, and one step beyond."""
        self._note_loss_scale()
        if self.composition.lora:
            fill_adapters(self.trainer)
            self.trainer.engine.let_go()
        for step in range(SAVED):
            self._step(step)
        self.told.validation = self.trainer.evaluate(self._micro_batches(0)).mean
        self.told.logits = LiveModel(self.trainer).lead(lambda ask: ask(PROMPTS, None))
        self._refuse_a_step()
        self.saving.save(self.trainer.engine, SAVED)
        self._note_loss_scale()
        self._step(SAVED)
        self.may_write.set()
        self.saving.end()
        assert self.saving.failure is None, self.saving.failure

    def go_on(self) -> None:
        """From the save to the end."""
        self._note_loss_scale()
        for step in range(SAVED, NUM_STEPS):
            self._step(step)
        self.trainer.copies.check(NUM_STEPS)

    def _step(self, step: int) -> None:
        result = self.trainer.train_step(
            self._micro_batches(step), self.case.rate * learning_rate_of(step), self.guard.objection
        )
        assert result.is_taken, f"step {step} of {self.composition}"
        self.told.losses.append(result.loss)
        self.told.norms.append(result.grad_norm)

    def _refuse_a_step(self) -> None:
        """One that the last rank objects to; in bf16 and fp16 one whose loss is no number."""
        batches, objection = self._micro_batches(SAVED), self.guard.objection
        if self.case.precision != "fp32":
            batches = [_poisoned(batch) for batch in batches]
        elif self.trainer.context.rank == WORLD_SIZE - 1:
            objection = _objects
        result = self.trainer.train_step(batches, 1.0, objection)
        self.told.verdicts.append(self.guard.conclude(SAVED, result, lambda: result, lambda: False))

    def _note_loss_scale(self) -> None:
        self.told.loss_scales.append(self.trainer.engine.loss_scale)

    def _micro_batches(self, step: int) -> list[Batch]:
        batch = self.composition.batch(step, self.chats)
        return parts_of(batch, self.trainer.context["dp"])


def _poisoned(batch: Batch) -> Batch:
    """Its loss is no number."""
    if batch.references is not None:
        return replace(batch, references=torch.full_like(batch.references, nan))
    assert batch.labels is not None
    return replace(batch, loss_weights=torch.full(batch.labels.shape, nan))


def _objects(loss: float, norm: float) -> str:
    return "a device of its own opinion"


def _nobody(text: str) -> Any:
    """Hears a report."""
