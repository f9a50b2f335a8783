"""Gradients of weights that a backward leaves for later: a split backward (Qi 2023, arXiv 2401.10241)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Deferred:
    """Weights, and what computes their gradients, in this order.

    begin: starts the communication that `gradients` waits for; called once or more before it.
    """

    weights: Sequence[nn.Parameter]
    gradients: Callable[[], Sequence[torch.Tensor]]
    begin: Callable[[], None]


@dataclass
class DeferredGradients:
    """What the layers of a model have left for later, in the order of their backwards.

    keeps_gathered: whether inputs that were gathered along the sequence are kept until then, which takes
        tp_size times the memory, or gathered again.
    """

    keeps_gathered: bool = False
    _left: list[Deferred] = field(default_factory=list, init=False)

    def leave(
        self,
        weights: Sequence[nn.Parameter],
        gradients: Callable[[], Sequence[torch.Tensor]],
        begin: Callable[[], None],
    ) -> None:
        """Called by a layer in its backward."""
        self._left.append(Deferred(weights, gradients, begin))

    def take(self) -> list[Deferred]:
        """All that was left since the last call."""
        taken, self._left = self._left, []
        return taken


def scalar_of(deferred: Sequence[Deferred]) -> torch.Tensor:
    """A zero whose backward gives each weight what was left for it, whatever the zero's own gradient is.

    So the second part of a backward is a backward like others, to autograd and to all that hooks into it.
    Autograd goes from the last item to the first; each begins the communication of the one after it.
    """
    following = [None, *deferred[:-1]]
    zeros = [_Later.apply(*pair, *pair[0].weights) for pair in zip(deferred, following, strict=True)]
    return torch.stack(zeros).sum()


class _Later(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, item: Deferred, following: Deferred | None, *weights: torch.Tensor) -> torch.Tensor:
        ctx.item, ctx.following = item, following
        return torch.zeros((), dtype=torch.float32, device=weights[0].device)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.item.begin()
        if ctx.following is not None:
            ctx.following.begin()
        return None, None, *ctx.item.gradients()
