"""The head of a language model: hidden states to logits, or to losses, whose logits are never whole.

Shapes: s sequence, b micro batch, h hidden, n = s * b tokens, V vocabulary, t tensor-parallel ranks.

Logits of many tokens are the largest tensor of a step. So tokens are taken a chunk at a time, whose logits
turn into their gradient and from there into those of hidden states and weight, before the next chunk comes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Literal

import torch
from torch import nn

from megalite.batch import IGNORED
from megalite.parallel.cross_entropy import losses_in_place
from megalite.parallel.linear import ColumnParallelLinear
from megalite.parallel.mappings import start_all_gather, start_all_reduce, start_reduce_scatter, wait_for
from megalite.parallel.plan import LayerPlan
from megalite.parallel.vocabulary import CHUNK_LOGITS


@dataclass(frozen=True)
class _Chunks:
    """The tokens of a micro batch, of which equal parts go through the head, each with few logits.

    Attributes:
        labels: [n].
        vocab_size: without padding.
        most_tokens: of one part.
    """

    labels: torch.Tensor
    vocab_size: int
    most_tokens: int
    plan: LayerPlan

    def losses(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        coefficients: torch.Tensor | None,
        wants: tuple[bool, bool],
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Losses [n]; where wanted the gradients of their sum, each times its coefficient, in x and weight.

        x: [s, b, h], or [s/t, b, h] under sequence parallelism. coefficients: [n], None for no gradients.
        """
        products, group = self.plan.products, self.plan.tp_group
        full = self._enter(x)
        tokens = full.flatten(0, 1)
        grad_weight, grad_tokens, losses = None, [], []
        for part in self._parts():
            logits = products.output(tokens[part], weight)
            of_part = None if coefficients is None else coefficients[part]
            of_tokens = losses_in_place(
                logits, self.labels[part], of_part, vocab_size=self.vocab_size, group=group
            )
            losses.append(of_tokens)
            if wants[0]:
                grad_tokens.append(products.input_gradient(logits, weight))
            if wants[1]:
                grad_weight = _plus(grad_weight, products.weight_gradient(logits, tokens[part]))
        grad_x = self._leave(torch.cat(grad_tokens).view(full.shape)) if wants[0] else None
        if grad_weight is not None and grad_weight.dtype != weight.dtype:
            grad_weight = grad_weight.to(weight.dtype)
        return torch.cat(losses), grad_x, grad_weight

    def _parts(self) -> Iterator[slice]:
        size = ceil(len(self.labels) / ceil(len(self.labels) / self.most_tokens))
        return (slice(start, start + size) for start in range(0, len(self.labels), size))

    def _enter(self, x: torch.Tensor) -> torch.Tensor:
        full, work = start_all_gather(x, self.plan.tp_group) if self.plan.sequence_parallel else (x, None)
        wait_for(work)
        return full

    def _leave(self, grad: torch.Tensor) -> torch.Tensor:
        start = start_reduce_scatter if self.plan.sequence_parallel else start_all_reduce
        grad, work = start(grad, self.plan.tp_group)
        wait_for(work)
        return grad


def _plus(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    """The sum so far, at least fp32 from the second part on: half precision would lose later ones."""
    if total is None:
        return part
    return total.to(torch.promote_types(total.dtype, torch.float32)).add_(part)


def _scaled(gradient: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return gradient.mul_(scale)


class _LossSum(torch.autograd.Function):
    """sum of coefficient * loss: gradients are made in forward, and only scaled in backward.

    So each chunk's logits are computed once; kept for backward is a gradient of x and one of the weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        coefficients: torch.Tensor,
        chunks: _Chunks,
        is_training: bool,
    ) -> torch.Tensor:
        wants = (is_training and ctx.needs_input_grad[0], is_training and ctx.needs_input_grad[1])
        losses, *ctx.gradients = chunks.losses(x, weight, coefficients if any(wants) else None, wants)
        return (losses * coefficients).sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "a loss sum goes backward once: its gradients are scaled where they lie"
        return *(each if each is None else _scaled(each, grad) for each in gradients), None, None, None


class _TokenLosses(torch.autograd.Function):
    """The loss of each token [n], whose coefficients backward learns: it computes the logits again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, chunks: _Chunks) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.chunks = chunks
        return chunks.losses(x, weight, None, (False, False))[0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        coefficients = grad.masked_fill(ctx.chunks.labels == IGNORED, 0)
        gradients = ctx.chunks.losses(*ctx.saved_tensors, coefficients, ctx.needs_input_grad[:2])[1:]
        return *gradients, None


class VocabParallelHead(ColumnParallelLinear):
    """A column-parallel layer to the vocabulary, padded as its weight is, and the cross-entropy behind it.

    Its products are not rounded to fp8, where others are.

    Attributes:
        chunk_logits: how many logits a rank holds at a time, at least those of one token.
        reads_weight_in_backward: whether that of the last forward does; not where losses were summed.
    """

    chunk_logits = CHUNK_LOGITS

    def __init__(self, hidden_size: int, vocab_size: int, plan: LayerPlan, weight: nn.Parameter) -> None:
        super().__init__(hidden_size, vocab_size, replace(plan, fp8=None), weight=weight)
        self.vocab_size = vocab_size
        self.reads_weight_in_backward = True

    def forward(
        self,
        x: torch.Tensor,
        labels: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        reduction: Literal["sum", "none"] = "sum",
    ) -> torch.Tensor:
        """x [s, b, h] (or [s/t, b, h] under sequence parallelism) to logits [s, b, padded V/t], or to losses.

        labels: [s, b], ids or IGNORED, which has no part; with them the result is losses in nats, at least
            fp32: their "sum", each times its weight, or with "none" each by itself [s, b].
        weights: [s, b] of a sum's losses; None weighs all alike.
        """
        self.reads_weight_in_backward = labels is None or reduction == "none"
        if labels is None:
            return super().forward(x)
        local_size = self.weight.size(0)
        most_tokens = max(1, self.chunk_logits // local_size)
        chunks = _Chunks(labels.flatten(), self.vocab_size, most_tokens, self.plan)
        if reduction == "none":
            return _TokenLosses.apply(x, self.weight, chunks).view_as(labels)
        counted = (chunks.labels != IGNORED).to(torch.float32)
        coefficients = counted if weights is None else counted * weights.flatten()
        return _LossSum.apply(x, self.weight, coefficients, chunks, torch.is_grad_enabled())
