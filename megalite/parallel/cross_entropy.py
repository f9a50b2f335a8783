"""Cross-entropy on logits whose vocabulary lies on many ranks; the logits are never gathered."""

from typing import Any

import torch
import torch.distributed as dist

from megalite.batch import IGNORED
from megalite.parallel.context import Group, group_size


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """loss = log(sum_v exp z_v) - z_label;  grad_z = (softmax(z) - onehot(label)) * grad_loss.

    Both are exactly 0 where the label is IGNORED.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, group: Group
    ) -> torch.Tensor:
        num_local = logits.size(-1)
        first_id = (0 if group is None else group.rank()) * num_local
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        scores[..., max(0, min(num_local, vocab_size - first_id)) :] = -torch.inf  # padding never counts
        highest = _all_reduced(scores.amax(dim=-1), dist.ReduceOp.MAX, group)
        scores -= highest.unsqueeze(-1)
        local = labels - first_id
        elsewhere = (local < 0) | (local >= num_local) | (labels < 0)
        local = local.masked_fill(elsewhere, 0)
        target = scores.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0)
        total = scores.exp_().sum(dim=-1)
        target, total = _all_reduced(torch.stack([target, total]), dist.ReduceOp.SUM, group)
        ctx.dtype = logits.dtype
        ignored = labels == IGNORED
        ctx.save_for_backward(scores.div_(total.unsqueeze(-1)), local, elsewhere, ignored)
        return (total.log() - target).masked_fill_(ignored, 0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        probabilities, local, elsewhere, ignored = ctx.saved_tensors
        grad = grad.masked_fill(ignored, 0)
        grad_logits = probabilities * grad.unsqueeze(-1)
        onehot = torch.where(elsewhere, 0, -grad).unsqueeze(-1)
        grad_logits.scatter_add_(-1, local.unsqueeze(-1), onehot)
        return grad_logits.to(ctx.dtype), None, None, None


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, *, vocab_size: int, group: Group = None
) -> torch.Tensor:
    """Loss of each token [s, b], at least fp32, in nats.

    logits: [s, b, padded vocabulary / t], this rank's slice. labels: [s, b], ids below vocab_size, or
    IGNORED (-100), where the loss and its gradient are 0.
    Columns from vocab_size on are padding and have no part in the loss.
    """
    return _VocabParallelCrossEntropy.apply(logits, labels, vocab_size, group)


def _all_reduced(x: torch.Tensor, op: dist.ReduceOp.RedOpType, group: Group) -> torch.Tensor:
    if group_size(group) > 1:
        dist.all_reduce(x, op=op, group=group)
    return x
