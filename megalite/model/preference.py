"""Losses on pairs of answers and on single ones, and what is told of them.

Shapes: s sequence, b rows, n pairs. The rows of a batch of pairs are chosen, rejected, chosen, rejected, ...;
labels of the prompt are IGNORED.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from megalite.batch import IGNORED, Batch
from megalite.config.tuning import PreferenceConfig
from megalite.model.loss import Head
from megalite.parallel.context import Group
from megalite.parallel.mappings import sum_over

MEASURES = (  # names of trl, each a mean over pairs
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)

UNPAIRED_MEASURES = (  # sums over desirable answers, over the others, and over all
    "rewards/chosen",
    "logps/chosen",
    "count/chosen",
    "rewards/rejected",
    "logps/rejected",
    "count/rejected",
    "kl",
)


def log_probabilities(head: Head, batch: Batch, *, cp_group: Group = None) -> torch.Tensor:
    """Of each row's labels together [b], in nats, at least fp32; the same on the ranks of cp_group.

    The head is behind the hidden states of this rank's part of the sequence. Backward sums what the ranks of
    cp_group make of the result.
    """
    assert batch.labels is not None
    losses = head(labels=batch.labels.T, reduction="none")
    return -sum_over(losses.sum(dim=0), cp_group)


class PreferenceLoss:
    """The sum over pairs of -log sigmoid(reward of chosen - reward of rejected - margin).

        DPO     reward = beta (log p - log p of the reference)    Rafailov 2023, arXiv 2305.18290, equation 7
        SimPO   reward = beta log p / number of labels            Meng 2024, arXiv 2405.14734, equation 6

    with log p = sum of the log-probabilities of an answer's tokens. DPO has no margin.
    """

    def __init__(self, config: PreferenceConfig, *, cp_group: Group = None) -> None:
        self.config, self.cp_group = config, cp_group

    def __call__(self, head: Head, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(the sum, a scalar, and detached sums [6] of MEASURES)."""
        log_p = log_probabilities(head, batch, cp_group=self.cp_group)
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
            return self.config.beta * log_p / sum_over((batch.labels != IGNORED).sum(dim=1), self.cp_group)
        assert batch.references is not None
        return self.config.beta * (log_p - batch.references)


class UnpairedLoss:
    """KTO: the sum over answers of what is missing to the most that each could be worth.

        desirable    desirable_weight (1 - sigmoid(reward - beta z))
        the others   undesirable_weight (1 - sigmoid(beta z - reward))    Ethayarajh 2024, arXiv 2402.01306

    with reward = beta (log p - log p of the reference), as in equations 7 and 8 there; z is
    batch.reference_point, an estimate of a KL divergence, and has no gradient.
    """

    def __init__(self, config: PreferenceConfig, *, cp_group: Group = None) -> None:
        self.config, self.cp_group = config, cp_group

    def __call__(self, head: Head, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(the sum, a scalar, and detached sums [7] of UNPAIRED_MEASURES)."""
        desirable, point = batch.desirable, batch.reference_point
        assert batch.references is not None and desirable is not None and point is not None
        config = self.config
        log_p = log_probabilities(head, batch, cp_group=self.cp_group)
        rewards = config.beta * (log_p - batch.references)
        signs = torch.where(desirable, 1.0, -1.0)
        weights = torch.where(desirable, config.desirable_weight, config.undesirable_weight)
        losses = weights * torch.sigmoid(-signs * (rewards - config.beta * point))  # 1 - sigmoid(x)
        columns = torch.stack([rewards, log_p, torch.ones_like(log_p)]).detach()
        told = [(columns * of).sum(dim=1) for of in (desirable, ~desirable)]
        return losses.sum(), torch.cat([*told, (point * len(log_p)).to(log_p).view(1)])


def log_ratio(log_p: torch.Tensor, batches: Sequence[Batch]) -> torch.Tensor:
    """Of rows [n] of these batches together: sum of log p - log p of the reference, and n; fp64 [2]."""
    references = torch.cat([batch.references for batch in batches if batch.references is not None])
    total = (log_p - references).sum(dtype=torch.float64)
    return torch.stack([total, torch.full_like(total, len(log_p))])
