"""Tokens to the experts that they chose, and what those made of them back; no token is dropped.

Shapes: n tokens of this rank, k choices of each, h features, E experts, r ranks that share them. Rank j of
these holds experts [j E/r, (j+1) E/r). A row is one choice of one token: n k rows leave, m arrive.

Both ways are permutations of rows, within a rank and by all-to-all between ranks; backward is the other way:

                     forward                                    backward
    spread           each token k times, by expert              rows back, and the k of a token summed
    collect          rows back, k for each token                rows by expert
"""

from typing import Any

import torch
import torch.distributed as dist

from megalite.parallel.context import Group, Ranks


class Dispatch:
    """The way of one batch of tokens, there and back.

    Args:
        chosen: int64 [n, k], the experts of each token, all unlike.
        num_experts: E.
        ranks: those that share the experts.

    Attributes:
        counts: int64 [E/r], rows that arrive for each expert of this rank.
    """

    def __init__(self, chosen: torch.Tensor, num_experts: int, ranks: Ranks) -> None:
        rows = chosen.flatten()
        self.num_choices = chosen.size(1)
        self.group = ranks.group
        self.order = rows.argsort(stable=True)  # by expert, so by rank too
        self.inverse = self.order.argsort()
        self.counts = counts_of(rows, num_experts)
        self.is_local = ranks.size == 1
        if not self.is_local:
            self._meet(ranks)

    def _meet(self, ranks: Ranks) -> None:
        """Tell each rank what it is going to get; rows arrive by rank, and go on by expert."""
        sent = self.counts.view(ranks.size, -1)
        arriving = torch.empty_like(sent)
        dist.all_to_all_single(arriving, sent, group=self.group)
        self.num_sent, self.num_arriving = self._numbers(sent), self._numbers(arriving)
        self.counts = arriving.sum(0)
        experts = torch.arange(sent.size(1), device=sent.device).repeat(ranks.size)
        num_rows = sum(self.num_arriving)
        arrived = experts.repeat_interleave(arriving.flatten(), output_size=num_rows)
        self.regroup = arrived.argsort(stable=True)
        self.ungroup = self.regroup.argsort()

    def _numbers(self, rows: torch.Tensor) -> list[int]:
        """Of rows [r, E/r] to or from each rank and expert, those of each rank: the host waits for them."""
        return rows.sum(1).tolist()

    def spread(self, tokens: torch.Tensor) -> torch.Tensor:
        """[n, h] -> [m, h], the rows of this rank's experts, expert by expert."""
        rows: torch.Tensor = _Spread.apply(tokens, self.order, self.inverse, self.num_choices)
        if self.is_local:
            return rows
        rows = _Exchange.apply(rows, self.num_sent, self.num_arriving, self.group)
        return _Permute.apply(rows, self.regroup, self.ungroup)

    def collect(self, rows: torch.Tensor) -> torch.Tensor:
        """[m, h] -> [n, k, h], in the order of `chosen`."""
        if not self.is_local:
            rows = _Permute.apply(rows, self.ungroup, self.regroup)
            rows = _Exchange.apply(rows, self.num_arriving, self.num_sent, self.group)
        rows = _Permute.apply(rows, self.inverse, self.order)
        return rows.unflatten(0, (-1, self.num_choices))


def counts_of(numbers: torch.Tensor, size: int, weights: torch.Tensor | None = None) -> torch.Tensor:
    """How often each of 0 to size - 1 is among numbers, int64 [size]; weights: int64, of the same shape.

    torch.bincount would have the host wait for a GPU: the length of what it gives depends on the numbers.
    """
    numbers = numbers.flatten()
    weights = torch.ones_like(numbers) if weights is None else weights.flatten()
    return numbers.new_zeros(size).scatter_add_(0, numbers, weights)


class _Spread(torch.autograd.Function):
    """Each token k times, permuted; the sum of backward is in one order, also where adding is not."""

    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, num_choices: int
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        ctx.num_choices = num_choices
        return tokens.index_select(0, order // num_choices)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        choices = grad.index_select(0, inverse).unflatten(0, (-1, ctx.num_choices))
        return choices.sum(1), None, None, None


class _Permute(torch.autograd.Function):
    """Rows in another order; backward is the inverse order."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class _Exchange(torch.autograd.Function):
    """All-to-all of rows: so many to each rank, so many from each; backward sends them back."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, to_each: list[int], from_each: list[int], group: Group
    ) -> torch.Tensor:
        ctx.to_each, ctx.from_each, ctx.group = to_each, from_each, group
        return _all_to_all(rows, to_each, from_each, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _all_to_all(grad, ctx.from_each, ctx.to_each, ctx.group), None, None, None


def _all_to_all(rows: torch.Tensor, to_each: list[int], from_each: list[int], group: Group) -> torch.Tensor:
    arriving = rows.new_empty(sum(from_each), *rows.shape[1:])
    dist.all_to_all_single(arriving, rows.contiguous(), from_each, to_each, group=group)
    return arriving
