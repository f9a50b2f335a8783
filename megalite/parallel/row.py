"""The product of a row layer in pieces, each summed over the ranks while the next is computed.

Shapes: s sequence, b micro batch, i input features, o output features, t tensor-parallel ranks.

Under sequence parallelism the sum of partial products is scattered: rank j keeps the j-th part of the
sequence. A piece is the same rows of every part, so that its sum is those rows of each rank's output:

    parts  |  rank 0's   |  rank 1's   |
    piece    0  0  1  1    0  0  1  1
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from megalite.kernels.products import MatrixProducts
from megalite.parallel.context import group_size
from megalite.parallel.mappings import Gathering, by_rank, start_reduce_scatter, wait_for
from megalite.parallel.plan import LayerPlan


def scattered_linear(
    x: torch.Tensor, plan: LayerPlan, weight: nn.Parameter, products: MatrixProducts
) -> torch.Tensor:
    """x [s, b, i/t] to the sum over ranks of x_r @ W_r.T, [s/t, b, o] of it here, in plan.row_chunks pieces.

        dx = gather(dy) @ W_r      dW_r = gather(dy).T @ x

    Backward gathers the pieces of dy one behind the other, and computes those of dx meanwhile.
    """
    if plan.deferred is not None and torch.is_grad_enabled():
        assert x.requires_grad and weight.requires_grad
        return _RowLinearApart.apply(x, plan, products, [weight])
    return _RowLinear.apply(x, plan, products, weight)


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, plan: LayerPlan, products: MatrixProducts, weight: torch.Tensor
    ) -> torch.Tensor:
        ctx.plan, ctx.products = plan, products
        ctx.save_for_backward(x, weight)
        return _output(x, weight, plan, products)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x, full = _input_gradient(grad, weight, ctx.plan, ctx.products)
        grad_weight = ctx.products.weight_gradient(full, x) if ctx.needs_input_grad[3] else None
        return grad_x, None, None, grad_weight


class _RowLinearApart(torch.autograd.Function):
    """The same, with dW left for later: autograd is not told of the weight."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, plan: LayerPlan, products: MatrixProducts, weights: Sequence[nn.Parameter]
    ) -> torch.Tensor:
        ctx.plan, ctx.products, ctx.weights = plan, products, weights
        ctx.save_for_backward(x)
        return _output(x, weights[0], plan, products)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,), products, weights = ctx.saved_tensors, ctx.products, ctx.weights
        grad_x, full = _input_gradient(grad, weights[0], ctx.plan, products)
        ctx.plan.deferred.leave(weights, lambda: [products.weight_gradient(full, x)], lambda: None)
        return grad_x, None, None, None


def _output(x: torch.Tensor, weight: torch.Tensor, plan: LayerPlan, products: MatrixProducts) -> torch.Tensor:
    parts = by_rank(x, plan.tp_group)
    begun = [
        start_reduce_scatter(products.output(piece.flatten(0, 1), weight), plan.tp_group)
        for piece in _pieces(parts, plan.row_chunks, dim=1)
    ]
    for _, work in begun:
        wait_for(work)
    return torch.cat([summed for summed, _ in begun])


def _input_gradient(
    grad: torch.Tensor, weight: torch.Tensor, plan: LayerPlan, products: MatrixProducts
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx [s, b, i/t], and the whole of dy [s, b, o].

    One piece is gathered ahead; all of many at once would take the memory of dy a second time.
    """
    group, count = plan.tp_group, plan.row_chunks
    length = grad.size(0) * group_size(group)
    grad_x = grad.new_empty(length, grad.size(1), weight.size(1))
    full = grad.new_empty(length, *grad.shape[1:])
    gatherings = [Gathering(piece, group) for piece in _pieces(grad, count)]
    targets = (_pieces(by_rank(whole, group), count, dim=1) for whole in (full, grad_x))
    for gathering, following, *places in zip(gatherings, [*gatherings[1:], None], *targets, strict=True):
        piece = gathering.whole()
        if following is not None:
            following.begin()
        for place, rows in zip(places, (piece, products.input_gradient(piece, weight)), strict=True):
            place.copy_(by_rank(rows, group))
    return grad_x, full


def _pieces(x: torch.Tensor, count: int, dim: int = 0) -> Sequence[torch.Tensor]:
    """Views, at most `count`, none empty; they differ by at most one row."""
    return x.tensor_split(min(count, x.size(dim)), dim)
