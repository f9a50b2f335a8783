"""What a run minimises: a sum over a batch, what it is divided by, and what else is told of it."""

from collections.abc import Mapping
from typing import Protocol

import torch

from megalite.batch import Batch
from megalite.config.run import RunConfig
from megalite.model.loss import Head, next_token_loss
from megalite.model.preference import MEASURES, UNPAIRED_MEASURES, PreferenceLoss, UnpairedLoss
from megalite.parallel.context import ParallelContext


class Objective(Protocol):
    """Attributes:
    measures: names of further sums.
    sums: these over the batches since they were last set to zero, fp64.
    """

    measures: tuple[str, ...]
    sums: torch.Tensor

    def loss(self, head: Head, batch: Batch) -> torch.Tensor:
        """The sum over a micro batch, from the head behind its last hidden states."""

    def count(self, batch: Batch) -> torch.Tensor:
        """What the sum is to be divided by, fp64 scalar."""

    def means(self, sums: Mapping[str, float], count: float) -> dict[str, float]:
        """What is told of further sums over any number of batches and ranks, and of what was counted."""


class NextTokens:
    """The mean over all labels that count, each by its weight."""

    measures: tuple[str, ...] = ()

    def __init__(self, run: RunConfig, context: ParallelContext) -> None:
        self.sums = torch.zeros(0, dtype=torch.float64, device=context.device)

    def loss(self, head: Head, batch: Batch) -> torch.Tensor:
        return next_token_loss(head, batch)

    def count(self, batch: Batch) -> torch.Tensor:
        return batch.loss_count()

    def means(self, sums: Mapping[str, float], count: float) -> dict[str, float]:
        return {}


class _Telling:
    """What losses that tell sums of their measures have in common.

    All ranks of cp have every row's whole loss, and count it: sums and counts are as many times too large.
    """

    measures: tuple[str, ...]
    loss_kind: type[PreferenceLoss] | type[UnpairedLoss]
    rows_per_count: int  # of a batch, for one of what is counted

    def __init__(self, run: RunConfig, context: ParallelContext) -> None:
        self._loss = self.loss_kind(run.preference, cp_group=context["cp"].group)
        self.sums = torch.zeros(len(self.measures), dtype=torch.float64, device=context.device)

    def loss(self, head: Head, batch: Batch) -> torch.Tensor:
        total, told = self._loss(head, batch)
        self.sums += told
        return total

    def count(self, batch: Batch) -> torch.Tensor:
        assert batch.labels is not None
        number = len(batch.labels) / self.rows_per_count
        return torch.tensor(number, dtype=torch.float64, device=batch.labels.device)


class Preferences(_Telling):
    """The mean over pairs, each a sample of two rows."""

    measures: tuple[str, ...] = MEASURES
    loss_kind = PreferenceLoss
    rows_per_count = 2

    def means(self, sums: Mapping[str, float], count: float) -> dict[str, float]:
        return {name: value / count for name, value in sums.items()}


class UnpairedPreferences(_Telling):
    """The mean over answers, each a sample of one row, that are desirable or not."""

    measures: tuple[str, ...] = UNPAIRED_MEASURES
    loss_kind = UnpairedLoss
    rows_per_count = 1

    def means(self, sums: Mapping[str, float], count: float) -> dict[str, float]:
        """By trl's names; those of a side that has no answer are left out."""
        told = {"kl": sums["kl"] / count}
        for side in ("chosen", "rejected"):
            if number := sums[f"count/{side}"]:
                told |= {f"{name}/{side}": sums[f"{name}/{side}"] / number for name in ("rewards", "logps")}
        if {"rewards/chosen", "rewards/rejected"} <= told.keys():
            told["rewards/margins"] = told["rewards/chosen"] - told["rewards/rejected"]
        return told


def build_objective(run: RunConfig, context: ParallelContext) -> Objective:
    """That of a run's task."""
    if run.task != "prefer":
        return NextTokens(run, context)
    return UnpairedPreferences(run, context) if run.preference.loss == "kto" else Preferences(run, context)
