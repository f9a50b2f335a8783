"""Cross-entropy on logits whose vocabulary lies on many ranks; the logits are never gathered.

Shapes: n tokens, V vocabulary, t tensor-parallel ranks.
"""

from typing import Any

import torch

from megalite.batch import IGNORED
from megalite.parallel.context import Group, group_size
from megalite.parallel.mappings import start_all_gather, wait_for


def losses_in_place(
    logits: torch.Tensor,
    labels: torch.Tensor,
    coefficients: torch.Tensor | None = None,
    *,
    vocab_size: int,
    group: Group = None,
) -> torch.Tensor:
    """Loss of each token [n], at least fp32, in nats; the logits are lost, or become their own gradient:

        loss = log(sum_v exp z_v) - z_label        grad_z = coefficient * (softmax(z) - onehot(label))

    logits: [n, padded V/t], this rank's slice.
    labels: [n], ids below vocab_size, or IGNORED, whose loss is 0.
    coefficients: [n] of each token's gradient, 0 where its label is IGNORED; None for no gradient.
    Columns from vocab_size on are padding and have no part in the loss.
    """
    first_id = (0 if group is None else group.rank()) * logits.size(-1)
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Not -inf: a rank may hold nothing but padding, whose largest score is to be a number.
    scores[:, max(0, vocab_size - first_id) :] = torch.finfo(scores.dtype).min
    local = labels - first_id
    elsewhere = (local < 0) | (local >= logits.size(-1))
    place = local.masked_fill(elsewhere, 0).unsqueeze(-1)
    highest_here = scores.amax(dim=-1)
    target = scores.gather(-1, place).squeeze(-1).masked_fill(elsewhere, 0)
    total = scores.sub_(highest_here.unsqueeze(-1)).exp_().sum(dim=-1)
    highest, total, target = _over_ranks(highest_here, total, target, group)
    losses = total.log() + (highest - target)
    if coefficients is not None:
        scores *= ((highest_here - highest).exp() / total * coefficients).unsqueeze(-1)
        # p - 1, exact for p close to 1 too, where 1 - (1 - p) would have lost it in half precision.
        at_label = (torch.expm1(-losses) * coefficients).to(scores.dtype)
        at_label = torch.where(elsewhere, scores.gather(-1, place).squeeze(-1), at_label)
        scores.scatter_(-1, place, at_label.unsqueeze(-1))
        if scores is not logits:
            logits.copy_(scores)
    return losses.masked_fill(labels == IGNORED, 0)


def _over_ranks(
    highest: torch.Tensor, total: torch.Tensor, target: torch.Tensor, group: Group
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the whole vocabulary, [n] each: the highest score, sum_v exp(z_v - highest), the label's score."""
    if group_size(group) == 1:
        return highest, total, target
    everywhere, work = start_all_gather(torch.stack([highest, total, target]).unsqueeze(0), group)
    wait_for(work)
    highests, totals, targets = everywhere.unbind(dim=1)
    highest = highests.amax(dim=0)
    return highest, (totals * (highests - highest).exp()).sum(dim=0), targets.sum(dim=0)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Keeps the gradients of the losses' sum in the place of the logits: see losses_in_place."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, group: Group
    ) -> torch.Tensor:
        kept, flat = logits.flatten(0, -2).clone(), labels.flatten()
        counted = (flat != IGNORED).to(torch.float32)
        losses = losses_in_place(kept, flat, counted, vocab_size=vocab_size, group=group)
        ctx.save_for_backward(kept.view_as(logits))
        return losses.view_as(labels)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        return (kept * grad.unsqueeze(-1)).to(kept.dtype), None, None, None


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, *, vocab_size: int, group: Group = None
) -> torch.Tensor:
    """Loss of each token [s, b], at least fp32, in nats.

    logits: [s, b, padded vocabulary / t], this rank's slice. labels: [s, b], ids below vocab_size, or
    IGNORED (-100), where the loss and its gradient are 0.
    Columns from vocab_size on are padding and have no part in the loss.
    """
    return _VocabParallelCrossEntropy.apply(logits, labels, vocab_size, group)
