"""The product of a linear layer with its collectives: enter once, compute, and overlap in backward.

Shapes: s sequence, b micro batch, i input features, o output features, t tensor-parallel ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from megalite.parallel.context import Group
from megalite.parallel.mappings import start_all_gather, start_all_reduce, start_reduce_scatter, wait_for
from megalite.parallel.plan import LayerPlan
from megalite.parallel.products import MatrixProducts
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
        grad_weights = [
            _sum_over(group, ctx.products.weight_gradient(grad, full)) if needed else None
            for grad, group, needed in zip(grads, ctx.copy_groups, ctx.needs_input_grad[5:], strict=True)
        ]
        wait_for(reducing)
        return grad_x, None, None, None, None, *grad_weights


def column_linear(
    x: torch.Tensor, plan: LayerPlan, weights: Sequence[nn.Parameter]
) -> tuple[torch.Tensor, ...]:
    """x [s, b, i], or [s/t, b, i] under sequence parallelism, to x @ W_k.T [s, b, o_k/t] of each weight."""
    copy_groups = [_copy_group(weight, plan) for weight in weights]
    return _ColumnLinear.apply(x, plan.tp_group, plan.sequence_parallel, plan.products, copy_groups, *weights)


def local_linear(x: torch.Tensor, plan: LayerPlan, weight: nn.Parameter) -> torch.Tensor:
    """x @ W.T of what this rank has of both; the weight's gradient is summed where its spec says so.

    Not F.linear: autograd would keep a transposed view of the weight, which would hold the gathered weight in
    memory after ZeRO-3 has let it go.
    """
    (y,) = _ColumnLinear.apply(x, None, False, plan.products, [_copy_group(weight, plan)], weight)
    return y


def _copy_group(weight: nn.Parameter, plan: LayerPlan) -> Group:
    """The ranks over which a weight's gradient is a sum, at most one axis: key/value heads' copies."""
    return next((plan.context[axis].group for axis in spec_of(weight).summed_over), None)


def _sum_over(group: Group, grad: torch.Tensor) -> torch.Tensor:
    total, work = start_all_reduce(grad, group)
    wait_for(work)
    return total
