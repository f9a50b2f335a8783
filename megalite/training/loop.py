"""The training loop."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.run import RunConfig
from megalite.data.loader import Batches
from megalite.measure.metrics import Metrics
from megalite.model.balancing import ExpertLoad
from megalite.training.checkpoints import Checkpoints
from megalite.training.lr_schedule import learning_rate_at
from megalite.training.trainer import LossSum, StageTrainer, require_finite

Evaluate = Callable[[StageTrainer], dict[str, float]]


@dataclass(frozen=True)
class Data:
    """Where batches come from; validation may be absent."""

    train: Batches
    validation: Batches | None


def train(
    trainer: StageTrainer,
    data: Data,
    run: RunConfig,
    deepspeed: DeepSpeedConfig,
    checkpoints: Checkpoints,
    metrics: Metrics | None,
    first_step: int,
    evaluation: Evaluate | None = None,
) -> None:
    """Take the optimizer steps from `first_step` (1-based) to the last.

    Everything in a step depends on its number alone: the batch, the learning rate, and what is due.
    metrics: on the one rank that reports.
    evaluation: further numbers about the model, by name.
    """
    num_steps, batch_samples = run.schedule.num_steps, deepspeed.train_batch_size
    for step in range(first_step, num_steps + 1):
        started = time.perf_counter()
        learning_rate = learning_rate_at(step, run.schedule, run.optimizer)
        micro_batches = data.train.batch((step - 1) * batch_samples)
        result = trainer.train_step(micro_batches, learning_rate)
        require_finite(result, step, deepspeed.precision)
        step_seconds = time.perf_counter() - started

        validation_loss = None
        if data.validation and is_due(step, run.logging.validate_every_steps, num_steps):
            validation_loss = evaluate(trainer, data.validation, run, batch_samples)
        evaluated: dict[str, Any] = {}
        if evaluation and is_due(step, run.logging.evaluate_every_steps, num_steps):
            evaluated = evaluation(trainer)
        if metrics:
            metrics.record(
                step=step,
                loss=result.loss,
                grad_norm=result.grad_norm,
                learning_rate=learning_rate,
                step_seconds=step_seconds,
                validation_loss=validation_loss,
                **evaluated,
                **further_metrics(result.experts, is_due(step, run.logging.log_every_steps, num_steps)),
            )
        save_last = run.checkpoint.save_at_end and step == num_steps
        if save_last or is_due(step, run.checkpoint.save_every_steps):
            checkpoints.save(trainer.engine, step)


def further_metrics(experts: ExpertLoad | None, with_tokens: bool) -> dict[str, Any]:
    """The load of the experts by name; with_tokens: that of each layer's each expert too."""
    if experts is None:
        return {}
    return experts.as_metrics() | ({"expert_tokens": experts.tokens} if with_tokens else {})


def evaluate(trainer: StageTrainer, batches: Batches, run: RunConfig, batch_samples: int) -> float:
    """Mean loss in nats over the first `validation_steps` global batches: the same ones each time."""
    losses = LossSum()
    for index in range(run.logging.validation_steps):
        losses += trainer.evaluate(batches.batch(index * batch_samples))
    return losses.mean


def is_due(step: int, every: int, last: int | None = None) -> bool:
    """Whether something that happens every so many steps (0: never), and at the last, is due now."""
    return every > 0 and (step % every == 0 or step == last)
