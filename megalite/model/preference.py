"""Losses on pairs of answers, and what is told of them.

Shapes: s sequence, n pairs, V vocabulary, t tensor-parallel ranks. The rows of a batch are chosen, rejected,
chosen, rejected, ...; labels of the prompt are IGNORED.
"""

import torch
import torch.nn.functional as F

from megalite.batch import IGNORED, Batch
from megalite.config.tuning import PreferenceConfig
from megalite.parallel.context import Group
from megalite.parallel.cross_entropy import vocab_parallel_cross_entropy

MEASURES = (  # names of trl, each a mean over pairs
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


def log_probabilities(
    logits: torch.Tensor, batch: Batch, *, vocab_size: int, group: Group = None
) -> torch.Tensor:
    """Of each row's labels together [b], in nats, at least fp32.

    logits: [s, b, padded V/t], this rank's slice of the vocabulary.
    """
    assert batch.labels is not None
    losses = vocab_parallel_cross_entropy(logits, batch.labels.T, vocab_size=vocab_size, group=group)
    return -losses.sum(dim=0)


class PreferenceLoss:
    """The sum over pairs of -log sigmoid(reward of chosen - reward of rejected - margin).

        DPO     reward = beta (log p - log p of the reference)    Rafailov 2023, arXiv 2305.18290, equation 7
        SimPO   reward = beta log p / number of labels            Meng 2024, arXiv 2405.14734, equation 6

    with log p = sum of the log-probabilities of an answer's tokens. DPO has no margin.
    """

    def __init__(self, config: PreferenceConfig, *, vocab_size: int, group: Group = None) -> None:
        self.config, self.vocab_size, self.group = config, vocab_size, group

    def __call__(self, logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(the sum, a scalar, and detached sums [6] of MEASURES)."""
        log_p = log_probabilities(logits, batch, vocab_size=self.vocab_size, group=self.group)
        chosen, rejected = self._rewards(log_p, batch).unflatten(0, (-1, 2)).unbind(1)
        margins = chosen - rejected
        loss = -F.logsigmoid(margins - self.config.margin).sum()
        logps = log_p.unflatten(0, (-1, 2)).unbind(1)
        told = (chosen, rejected, margins, (margins > 0).to(log_p.dtype), *logps)
        return loss, torch.stack([each.detach().sum() for each in told])

    def _rewards(self, log_p: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[2n]"""
        if self.config.loss == "simpo":
            assert batch.labels is not None
            return self.config.beta * log_p / (batch.labels != IGNORED).sum(dim=1)
        assert batch.references is not None
        return self.config.beta * (log_p - batch.references)
