"""What is summed over tokens, and divided once for the whole global batch: see training/trainer.py."""

from typing import Protocol

import torch

from megalite.batch import Batch


class Head(Protocol):
    """A model's head behind its last hidden states, as a loss is given it: see parallel/head.py."""

    def __call__(
        self, *, labels: torch.Tensor, weights: torch.Tensor | None = None, reduction: str = "sum"
    ) -> torch.Tensor:
        """Losses of labels [s, b] in nats: their sum by weights [s, b], or with "none" each [s, b]."""


def next_token_loss(head: Head, batch: Batch) -> torch.Tensor:
    """The sum of the losses of all labels that count, each by its weight, in nats; a scalar, at least fp32.

    Its count is `batch.loss_count()`.
    """
    assert batch.labels is not None
    weights = batch.loss_weights
    return head(labels=batch.labels.T, weights=None if weights is None else weights.T)
