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

import torch
from torch import nn

from megalite.parallel.column import column_linear, local_linear
from megalite.parallel.lora import ColumnAdapter, RowAdapter
from megalite.parallel.mappings import reduce_from_tp, scatter_sequence
from megalite.parallel.plan import LayerPlan
from megalite.parallel.row import scattered_linear
from megalite.parallel.shard import (
    constant_initializer,
    cut_spec,
    describe_shards,
    draw_like_linear,
    sharded_parameter,
    whole_spec,
)


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
        self.adapters = nn.ModuleDict()
        for column in columns:
            if plan.adapts(column.name):
                full_name, over = f"{name}.{column.name}" if name else column.name, column.cut_over
                adapter = ColumnAdapter(in_features, column.out_features, plan, name=full_name, cut_over=over)
                self.adapters[column.name] = adapter

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[s, b, i] (or [s/t, b, i] under sequence parallelism) -> [s, b, o/t] per column."""
        names = [column.name for column in self.columns]
        outputs = column_linear(x, self.plan, [getattr(self, f"{name}_weight") for name in names])
        return tuple(self._offset(y, x, name) for name, y in zip(names, outputs, strict=True))

    def _offset(self, y: torch.Tensor, x: torch.Tensor, name: str) -> torch.Tensor:
        """One column's product with its bias and its adapter's output, where it has them."""
        bias = getattr(self, f"{name}_bias")
        if bias is not None:
            y = y + self.plan.with_whole_gradient(bias)
        return y + self.adapters[name](x) if name in self.adapters else y

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
        (y,) = column_linear(x, self.plan, [self.weight])
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
        self.adapter: RowAdapter | None = None
        if plan.adapts(name):
            self.adapter = RowAdapter(in_features, out_features, plan, name=name)
        self.bias = None
        if bias:
            spec = whole_spec(
                plan.context, _named(name, "bias"), (out_features,), is_summed=plan.sequence_parallel
            )
            self.bias = sharded_parameter(spec, constant_initializer(0.0), plan.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[s, b, i/t] -> [s, b, o] (or [s/t, b, o] under sequence parallelism)."""
        y = self._product(x)
        return y if self.bias is None else y + self.plan.with_whole_gradient(self.bias)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        """Without the bias; whole where an adapter adds to the sum, or fp8 scales whole tensors."""
        plan = self.plan
        products = plan.products_of(inputs_over=plan.tp_group)
        in_pieces = plan.row_chunks > 1 and plan.sequence_parallel and plan.context["tp"].size > 1
        if in_pieces and self.adapter is None and plan.fp8 is None:
            return scattered_linear(x, plan, self.weight, products)
        partial = local_linear(x, plan, self.weight, products)
        if self.adapter is not None:
            partial = partial + self.adapter(x)
        return self.leave(partial, plan.tp_group)

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
