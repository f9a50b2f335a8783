"""The training loop."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from megalite.checkpoint.format import VALIDATION_LOSS
from megalite.config.run import RunConfig
from megalite.data.loader import Batches
from megalite.measure.metrics import Metrics
from megalite.model.balancing import ExpertLoad
from megalite.pipeline.recording import Record, not_recorded
from megalite.training.course import Course
from megalite.training.data import Data
from megalite.training.guard import Guard
from megalite.training.lr_schedule import learning_rate_at
from megalite.training.places import Place
from megalite.training.saving import Saving
from megalite.training.stopping import FAILED_SAVE, Request, Stopping
from megalite.training.trainer import LossSum, StageTrainer

Evaluate = Callable[[StageTrainer], dict[str, float]]
Mark = Callable[[Place, int], None]
RecordStep = Callable[[int], AbstractContextManager[Record]]


def train(
    trainer: StageTrainer,
    data: Data,
    run: RunConfig,
    course: Course,
    guard: Guard,
    saving: Saving,
    stopping: Stopping,
    metrics: Metrics | None,
    evaluation: Evaluate | None = None,
    *,
    mark: Mark = lambda place, step: None,
    record_step: RecordStep = lambda step: nullcontext(not_recorded),
) -> Request | None:
    """Take the optimizer steps from where `course` stands to the last; the request that ended them before.

    A step depends on its number and on `course` alone: the batch, the learning rate, and what is due.
    metrics: on the one rank that reports.
    evaluation: further numbers about the model, by name.
    mark: told each place and step as they are reached.
    record_step: entered around each step, whose record is told what the step does.
    """
    first_step, num_steps = course.step + 1, run.schedule.num_steps
    step = first_step
    while step <= num_steps:
        learning_rate = learning_rate_at(step, run.schedule, run.optimizer)
        with record_step(step) as record:
            started = time.perf_counter()
            in_step = _begin_step(mark, step, step == first_step)
            micro_batches = data.train.batch(course.start_of(step))
            result = trainer.train_step(micro_batches, learning_rate, guard.objection, in_step, record)
            step_seconds = time.perf_counter() - started
        repeat = partial(trainer.try_step, micro_batches, learning_rate, in_step)
        if guard.conclude(step, result, repeat, partial(can_go_back, saving, mark, step)) == "roll back":
            course = go_back(trainer, course.without(step), guard, saving, metrics)
            step = course.step + 1
            continue
        if is_due(step, run.guard.check_copies_every_steps):
            trainer.copies.check(step)
        further: dict[str, Any] = {**result.further, **saving.metrics(), **guard.metrics()}
        further |= measure(trainer, data, run, step, evaluation, mark)
        if metrics:
            row: dict[str, Any] = {"loss": result.loss, "grad_norm": result.grad_norm}
            row |= {"learning_rate": learning_rate, "step_seconds": step_seconds, **further}
            row |= further_metrics(result.experts, is_due(step, run.logging.log_every_steps, num_steps))
            metrics.record(step=step, consumed_samples=course.end_of(step), **row)
        mark(Place.SAVING, step)
        request = agree(stopping, saving)
        if saving.is_due(step, step == num_steps, request):
            saving.save(trainer.engine, step, standing_of(step, course, guard, further), request)
        if request and request.stops and step < num_steps:
            break
        step += 1
    else:
        request = None
    saving.end()
    return request


def measure(
    trainer: StageTrainer, data: Data, run: RunConfig, step: int, evaluation: Evaluate | None, mark: Mark
) -> dict[str, Any]:
    """What is due after a step of the means of the validation, and of further numbers about the model."""
    options, num_steps = run.logging, run.schedule.num_steps
    found: dict[str, Any] = {}
    if data.validation and is_due(step, options.validate_every_steps, num_steps):
        begin_batch = partial(mark, Place.VALIDATION, step)
        found |= validate(trainer, data.validation, options.validation_steps, begin_batch)
    if evaluation and is_due(step, options.evaluate_every_steps, num_steps):
        mark(Place.EVALUATION, step)
        found |= evaluation(trainer)
    return found


def agree(stopping: Stopping, saving: Saving) -> Request | None:
    """The request that all ranks heed now; a save in flight that failed is told of."""
    request = stopping.agree(FAILED_SAVE if saving.has_failed else None)
    if request:
        saving.finish()
    return request


def standing_of(step: int, course: Course, guard: Guard, measured: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of the run besides its weights."""
    loss = {name: value for name, value in measured.items() if name == VALIDATION_LOSS}
    return {**course.state(step), "guard": guard.state(), **loss}


def can_go_back(saving: Saving, mark: Mark, step: int) -> bool:
    """Whether the run has a checkpoint, which takes as long as its checksums."""
    mark(Place.SAVING, step)
    return bool(saving.newest_state())


def go_back(
    trainer: StageTrainer, course: Course, guard: Guard, saving: Saving, metrics: Metrics | None
) -> Course:
    """Put everything where the newest checkpoint has it, and stay with what the course leaves out."""
    state = saving.go_back(trainer.engine)
    guard.restore(state.get("guard", {}))
    back = Course.after(state, course.batch_samples).leaving_out(course.left_out)
    if metrics:
        metrics.rewind(back.step)
    return back


def _begin_step(mark: Mark, step: int, is_first: bool) -> Callable[[Place], None]:
    """What the places within a step are told to; it begins with its data."""
    in_step = partial(_mark_step, mark, step, is_first)
    in_step(Place.READING)
    return in_step


def _mark_step(mark: Mark, step: int, is_first: bool, place: Place) -> None:
    """A place within a step; the first one is a place of its own, since it says nothing about the others."""
    mark(Place.FIRST_STEP if is_first else place, step)


def further_metrics(experts: ExpertLoad | None, with_tokens: bool) -> dict[str, Any]:
    """The load of the experts by name; with_tokens: that of each layer's each expert too."""
    if experts is None:
        return {}
    return experts.as_metrics() | ({"expert_tokens": experts.tokens} if with_tokens else {})


def validate(
    trainer: StageTrainer, batches: Batches, num_batches: int, begin_batch: Callable[[], None]
) -> dict[str, float]:
    """Means over the first global batches, the same ones each time.

    `validation_loss` in nats, and what else the objective tells, such as `validation_rewards/margins`.
    """
    losses = LossSum()
    for index in range(num_batches):
        begin_batch()
        losses += trainer.evaluate(batches.batch(index * trainer.batch_samples))
    return {f"validation_{name}": mean for name, mean in trainer.means(losses).items()}


def is_due(step: int, every: int, last: int | None = None) -> bool:
    """Whether something that happens every so many steps (0: never), and at the last, is due now."""
    return every > 0 and (step % every == 0 or step == last)
