"""What a run minimises: a sum over a batch, what it is divided by, and what else is told of it."""

from functools import partial
from typing import Protocol

import torch

from megalite.batch import Batch
from megalite.config.run import RunConfig
from megalite.model.loss import next_token_loss
from megalite.model.preference import MEASURES, PreferenceLoss
from megalite.parallel.context import ParallelContext


class Objective(Protocol):
    """Attributes:
    rows_per_sample: of a batch.
    measures: names of further means over what is counted.
    sums: of these over the batches since they were last set to zero, fp64.
    """

    rows_per_sample: int
    measures: tuple[str, ...]
    sums: torch.Tensor

    def loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The sum over a micro batch, from this rank's logits [s, b, padded V/t]."""

    def count(self, batch: Batch) -> torch.Tensor:
        """What the sum is to be divided by, fp64 scalar."""


class NextTokens:
    """The mean over all labels that count, each by its weight."""

    rows_per_sample = 1
    measures: tuple[str, ...] = ()

    def __init__(self, run: RunConfig, context: ParallelContext) -> None:
        self.loss = partial(next_token_loss, vocab_size=run.model.vocab_size, group=context["tp"].group)
        self.sums = torch.zeros(0, dtype=torch.float64, device=context.device)

    def count(self, batch: Batch) -> torch.Tensor:
        return batch.loss_count()


class Preferences:
    """The mean over pairs, each a sample of two rows."""

    rows_per_sample = 2
    measures: tuple[str, ...] = MEASURES

    def __init__(self, run: RunConfig, context: ParallelContext) -> None:
        vocab_size, group = run.model.vocab_size, context["tp"].group
        self._loss = PreferenceLoss(run.preference, vocab_size=vocab_size, group=group)
        self.sums = torch.zeros(len(MEASURES), dtype=torch.float64, device=context.device)

    def loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        total, told = self._loss(logits, batch)
        self.sums += told
        return total

    def count(self, batch: Batch) -> torch.Tensor:
        assert batch.labels is not None
        return torch.tensor(len(batch.labels) / 2, dtype=torch.float64, device=batch.labels.device)


def build_objective(run: RunConfig, context: ParallelContext) -> Objective:
    """That of a run's task."""
    return Preferences(run, context) if run.task == "prefer" else NextTokens(run, context)
