"""Linear layers whose weight lies on many ranks (Shoeybi 2019, arXiv 1909.08053).

Shapes: s sequence, b micro batch, i input features, o output features, t tensor-parallel ranks.
Weights are [o, i] as in torch.nn.Linear.

    column    y_r = x @ W_r.T        W_r [o/t, i]    each rank makes its slice of the output
    row       y = sum_r x_r @ W_r.T  W_r [o, i/t]    each rank eats its slice of the input

Under sequence parallelism x enters the column layer as [s/t, b, i] and leaves the row layer as
[s/t, b, o] (Korthikanti 2022, arXiv 2205.05198).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megalite.parallel.context import Group
from megalite.parallel.mappings import (
    reduce_from_tp,
    scatter_sequence,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
    wait_for,
)
from megalite.parallel.plan import LayerPlan
from megalite.parallel.products import MatrixProducts
from megalite.parallel.shard import (
    constant_initializer,
    cut_spec,
    describe_shards,
    draw_like_linear,
    sharded_parameter,
    spec_of,
    whole_spec,
)


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


def _column_linear(
    x: torch.Tensor, plan: LayerPlan, weights: Sequence[nn.Parameter]
) -> tuple[torch.Tensor, ...]:
    copy_groups = [_copy_group(weight, plan) for weight in weights]
    return _ColumnLinear.apply(x, plan.tp_group, plan.sequence_parallel, plan.products, copy_groups, *weights)


def _copy_group(weight: nn.Parameter, plan: LayerPlan) -> Group:
    """The ranks over which a cut weight's gradient is a sum, at most one axis: key/value heads' copies."""
    return next((plan.context[axis].group for axis in spec_of(weight).summed_over), None)


def _sum_over(group: Group, grad: torch.Tensor) -> torch.Tensor:
    total, work = start_all_reduce(grad, group)
    wait_for(work)
    return total


@dataclass(frozen=True)
class Column:
    """One output of a MergedColumnLinear: its name, its features, and the axis that it is cut over.

    cut_over: "tp", or "kv" for key/value heads, which have copies where they are fewer than the ranks.
    """

    name: str
    out_features: int
    cut_over: str = "tp"


class MergedColumnLinear(nn.Module):
    """Column-parallel layers that share one input: query, key and value; or gate and up.

    The input is gathered once for all of them, and its gradient reduced once. Each keeps a parameter of
    its own, because each has its own name, its own cut and its own count in the gradient norm.

    name: put before the columns' names in the specs.
    """

    def __init__(
        self,
        in_features: int,
        columns: Sequence[Column],
        plan: LayerPlan | None = None,
        *,
        bias: bool = False,
        name: str = "",
    ) -> None:
        super().__init__()
        self.plan = plan = plan or LayerPlan()
        self.columns = tuple(columns)
        for column in columns:
            full_name = f"{name}.{column.name}" if name else column.name
            weight, offset = _cut_parameters(
                plan, full_name, (column.out_features, in_features), 0, column.cut_over, bias
            )
            self.register_parameter(f"{column.name}_weight", weight)
            self.register_parameter(f"{column.name}_bias", offset)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[s, b, i] (or [s/t, b, i] under sequence parallelism) -> [s, b, o/t] per column."""
        weights = [getattr(self, f"{column.name}_weight") for column in self.columns]
        biases = [getattr(self, f"{column.name}_bias") for column in self.columns]
        return tuple(
            y if bias is None else y + self.plan.with_whole_gradient(bias)
            for y, bias in zip(_column_linear(x, self.plan, weights), biases, strict=True)
        )

    def extra_repr(self) -> str:
        return describe_shards(self)


class ColumnParallelLinear(nn.Module):
    """y[s, b, o/t] = x @ W_r.T + b_r, with rank r's rows of the weight; twin of torch.nn.Linear.

        dx = sum over ranks of dy_r @ W_r      dW_r = dy_r.T @ x      db_r = sum over s, b of dy_r

    Under sequence parallelism x is [s/t, b, i] and gathered first; dx is scattered. weight: an existing
    parameter to share (a tied embedding) in place of a new one.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        plan: LayerPlan | None = None,
        *,
        bias: bool = False,
        weight: nn.Parameter | None = None,
        name: str = "",
    ) -> None:
        super().__init__()
        self.plan = plan = plan or LayerPlan()
        shape = (out_features, in_features)
        if weight is None:
            weight, self.bias = _cut_parameters(plan, name, shape, 0, "tp", bias)
        else:
            self.bias = None
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[s, b, i] (or [s/t, b, i] under sequence parallelism) -> [s, b, o/t]."""
        (y,) = _column_linear(x, self.plan, [self.weight])
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return describe_shards(self)


class RowParallelLinear(nn.Module):
    """y[s, b, o] = sum over ranks of x_r[s, b, i/t] @ W_r.T, plus b; twin of torch.nn.Linear.

        dx_r = dy @ W_r      dW_r = dy.T @ x_r      db = sum over s, b of dy

    Under sequence parallelism y is [s/t, b, o], dy is gathered first, and db summed over the ranks. The bias
    is added after the sum, once.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        plan: LayerPlan | None = None,
        *,
        bias: bool = False,
        name: str = "",
    ) -> None:
        super().__init__()
        self.plan = plan = plan or LayerPlan()
        self.leave = scatter_sequence if plan.sequence_parallel else reduce_from_tp
        self.weight, _ = _cut_parameters(plan, name, (out_features, in_features), 1, "tp", bias=False)
        self.bias = None
        if bias:
            spec = whole_spec(
                plan.context, _named(name, "bias"), (out_features,), is_summed=plan.sequence_parallel
            )
            self.bias = sharded_parameter(spec, constant_initializer(0.0), plan.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[s, b, i/t] -> [s, b, o] (or [s/t, b, o] under sequence parallelism)."""
        # Not F.linear: autograd would keep a transposed view of the weight, which would hold the gathered
        # weight in memory after ZeRO-3 has let it go.
        (partial,) = _ColumnLinear.apply(x, None, False, self.plan.products, (None,), self.weight)
        y = self.leave(partial, self.plan.tp_group)
        return y if self.bias is None else y + self.plan.with_whole_gradient(self.bias)

    def extra_repr(self) -> str:
        return describe_shards(self)


def _cut_parameters(
    plan: LayerPlan, name: str, shape: tuple[int, int], dim: int, over: str, bias: bool
) -> tuple[nn.Parameter, nn.Parameter | None]:
    """A weight [o, i] cut along `dim`, and if wanted the bias of its rows, which begins at zero."""
    spec = cut_spec(plan.context, _named(name, "weight"), shape, dim, over=over)
    weight = sharded_parameter(spec, plan.init or draw_like_linear, plan.dtype)
    if not bias:
        return weight, None
    spec = cut_spec(plan.context, _named(name, "bias"), shape[:1], 0, over=over)
    return weight, sharded_parameter(spec, constant_initializer(0.0), plan.dtype)


def _named(layer: str, parameter: str) -> str:
    return f"{layer}.{parameter}" if layer else parameter
