"""The product of a linear layer with its collectives: enter once, compute, and overlap in backward.

Shapes: s sequence, b micro batch, i input features, o output features, t tensor-parallel ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from megalite.kernels.products import MatrixProducts
from megalite.parallel.context import Group
from megalite.parallel.mappings import (
    Gathering,
    equal_parts,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
    wait_for,
)
from megalite.parallel.plan import LayerPlan
from megalite.parallel.shard import spec_of


class _ColumnLinear(torch.autograd.Function):
    """Several column weights W_k over one input, which enters once.

        y_k  = X @ W_k.T                    X = x, or gather(x) along the sequence
        dx   = sum over ranks of sum_k dy_k @ W_k    scattered along the sequence, if X was gathered
        dW_k = dy_k.T @ X                   summed over the ranks that hold a copy of W_k

    X is not kept where it was gathered, which would cost t times the memory of x: backward gathers it again,
    while dx is computed; and dx is summed while the dW_k are computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        group: Group,
        sequence_parallel: bool,
        products: MatrixProducts,
        copy_groups: Sequence[Group],
        *weights: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.group, ctx.sequence_parallel, ctx.products = group, sequence_parallel, products
        ctx.copy_groups = copy_groups
        ctx.save_for_backward(x, *weights)
        full, work = start_all_gather(x, group) if sequence_parallel else (x, None)
        wait_for(work)
        return tuple(products.output(full, weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        full, gathering = start_all_gather(x, ctx.group) if ctx.sequence_parallel else (x, None)
        grad_x, reducing = None, None
        if ctx.needs_input_grad[0]:
            parts = map(ctx.products.input_gradient, grads, weights)
            grad_full = next(parts)
            for part in parts:
                grad_full += part
            leave = start_reduce_scatter if ctx.sequence_parallel else start_all_reduce
            grad_x, reducing = leave(grad_full, ctx.group)
        wait_for(gathering)
        sums = [
            start_all_reduce(ctx.products.weight_gradient(grad, full), group) if needed else (None, None)
            for grad, group, needed in zip(grads, ctx.copy_groups, ctx.needs_input_grad[5:], strict=True)
        ]
        for _, summing in sums:
            wait_for(summing)
        wait_for(reducing)
        return grad_x, None, None, None, None, *(grad_weight for grad_weight, _ in sums)


class _ColumnLinearApart(torch.autograd.Function):
    """The same, with the dW_k left for later: a backward of the input alone.

    Autograd is not told of the weights, which get no gradient in this backward. Nor is X gathered in it, but
    while the dW of the layer before are computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        plan: LayerPlan,
        group: Group,
        products: MatrixProducts,
        weights: Sequence[nn.Parameter],
    ) -> tuple[torch.Tensor, ...]:
        assert plan.deferred is not None
        ctx.plan, ctx.products, ctx.weights = plan, products, weights
        ctx.group, ctx.gathers = group, group is not None and plan.sequence_parallel
        full, work = start_all_gather(x, group) if ctx.gathers else (x, None)
        wait_for(work)
        ctx.keeps_gathered = ctx.gathers and plan.deferred.keeps_gathered
        ctx.save_for_backward(full if ctx.keeps_gathered else x)
        return tuple(products.output(full, weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,), plan, products, weights = ctx.saved_tensors, ctx.plan, ctx.products, ctx.weights
        parts = map(products.input_gradient, grads, weights)
        grad_full = next(parts)
        for part in parts:
            grad_full += part
        leave = start_reduce_scatter if ctx.gathers else start_all_reduce
        grad_x, reducing = leave(grad_full, ctx.group)
        gathering = Gathering(x, ctx.group if ctx.gathers and not ctx.keeps_gathered else None)

        def weight_gradients() -> list[torch.Tensor]:
            full = gathering.whole()
            sums = [
                start_all_reduce(products.weight_gradient(grad, full), _copy_group(weight, plan))
                for grad, weight in zip(grads, weights, strict=True)
            ]
            for _, summing in sums:
                wait_for(summing)
            return [grad_weight for grad_weight, _ in sums]

        plan.deferred.leave(weights, weight_gradients, gathering.begin)
        wait_for(reducing)
        return grad_x, None, None, None, None


def column_linear(
    x: torch.Tensor, plan: LayerPlan, weights: Sequence[nn.Parameter]
) -> tuple[torch.Tensor, ...]:
    """x [s, b, i], or [s/t, b, i] under sequence parallelism, to x @ W_k.T [s, b, o_k/t] of each weight."""
    group = plan.tp_group
    outputs = _linear(x, plan, group, plan.products_of(outputs_over=group), weights)
    if plan.fp8 is None:
        return outputs
    groups = [_copy_group(weight, plan) for weight in weights]
    return tuple(map(equal_parts, outputs, groups))


def local_linear(
    x: torch.Tensor, plan: LayerPlan, weight: nn.Parameter, products: MatrixProducts | None = None
) -> torch.Tensor:
    """x @ W.T of what this rank has of both; the weight's gradient is summed where its spec says so.

    products: by default those of the plan, which are not rounded.

    Not F.linear: autograd would keep a transposed view of the weight, which would hold the gathered weight in
    memory after ZeRO-3 has let it go.
    """
    (y,) = _linear(x, plan, None, products or plan.products, [weight])
    return y


def _linear(
    x: torch.Tensor,
    plan: LayerPlan,
    group: Group,
    products: MatrixProducts,
    weights: Sequence[nn.Parameter],
) -> tuple[torch.Tensor, ...]:
    if plan.deferred is not None and torch.is_grad_enabled():
        assert x.requires_grad and all(weight.requires_grad for weight in weights)
        return _ColumnLinearApart.apply(x, plan, group, products, weights)
    copy_groups = [_copy_group(weight, plan) for weight in weights]
    sequence_parallel = plan.sequence_parallel and group is not None
    return _ColumnLinear.apply(x, group, sequence_parallel, products, copy_groups, *weights)


def _copy_group(weight: nn.Parameter, plan: LayerPlan) -> Group:
    """The ranks over which a weight's gradient is a sum, at most one axis: key/value heads' copies."""
    return next((plan.context[axis].group for axis in spec_of(weight).summed_over), None)
