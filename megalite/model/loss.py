"""What is summed over tokens, and divided once for the whole global batch: see training/trainer.py."""

import torch

from megalite.batch import Batch
from megalite.parallel.context import Group
from megalite.parallel.cross_entropy import vocab_parallel_cross_entropy


def next_token_loss(
    logits: torch.Tensor, batch: Batch, *, vocab_size: int, group: Group = None
) -> torch.Tensor:
    """The sum of the losses of all labels that count, each by its weight, in nats; a scalar, at least fp32.

    logits: [s, b, padded V/t], this rank's slice of the vocabulary. Its count is `batch.loss_count()`.
    """
    assert batch.labels is not None
    losses = vocab_parallel_cross_entropy(logits, batch.labels.T, vocab_size=vocab_size, group=group)
    return (losses if batch.loss_weights is None else losses * batch.loss_weights.T).sum()
