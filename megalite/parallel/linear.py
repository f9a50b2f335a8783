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
import torch.nn.functional as F
from torch import nn

from megalite.parallel.context import Group
from megalite.parallel.mappings import (
    copy_to_tp,
    reduce_from_tp,
    scatter_sequence,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
    wait_for,
)
from megalite.parallel.shard import (
    Initializer,
    constant_initializer,
    cut_over,
    normal_initializer,
    replicated_over,
    sharded_parameter,
)

DEFAULT_INITIALIZER = normal_initializer(seed=0)


class _ColumnLinear(torch.autograd.Function):
    """Several column weights over one input, which enters once.

    The gathered input is not kept: backward gathers it again, while the input's gradient is computed;
    and that gradient is reduced while the weight gradients are computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        group: Group,
        sequence_parallel: bool,
        replica_groups: Sequence[Group],
        *weights: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.group, ctx.sequence_parallel, ctx.replica_groups = group, sequence_parallel, replica_groups
        ctx.save_for_backward(x, *weights)
        full, work = start_all_gather(x, group) if sequence_parallel else (x, None)
        wait_for(work)
        return tuple(F.linear(full, weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        full, gathering = start_all_gather(x, ctx.group) if ctx.sequence_parallel else (x, None)
        grad_x, reducing = None, None
        if ctx.needs_input_grad[0]:
            grad_full = sum((grad @ weight for grad, weight in zip(grads, weights, strict=True)), start=0)
            leave = start_reduce_scatter if ctx.sequence_parallel else start_all_reduce
            grad_x, reducing = leave(grad_full, ctx.group)
        wait_for(gathering)
        flat = full.flatten(0, -2)
        grad_weights = [
            _sum_over(group, grad.flatten(0, -2).T @ flat) if needed else None
            for grad, group, needed in zip(grads, ctx.replica_groups, ctx.needs_input_grad[4:], strict=True)
        ]
        wait_for(reducing)
        return grad_x, None, None, None, *grad_weights


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """F.linear without communication, but autograd keeps the parameter and not a transposed view of it:
    the view would hold the gathered weight in memory after ZeRO-3 has let it go."""
    (y,) = _ColumnLinear.apply(x, None, False, (None,), weight)
    return y


def _sum_over(group: Group, grad: torch.Tensor) -> torch.Tensor:
    total, work = start_all_reduce(grad, group)
    wait_for(work)
    return total


@dataclass(frozen=True)
class Column:
    """One output of a MergedColumnLinear.

    replicas: neighbouring ranks that hold the same rows, and sum their gradients.
    """

    name: str
    out_features: int
    replicas: int = 1


class MergedColumnLinear(nn.Module):
    """Column-parallel layers that share one input: query, key and value; or gate and up.

    The input is gathered once for all of them, and its gradient reduced once. Each keeps a parameter of
    its own, because each has its own name, its own cut and its own count in the gradient norm.
    """

    def __init__(
        self,
        in_features: int,
        columns: Sequence[Column],
        *,
        group: Group = None,
        replica_group: Group = None,
        sequence_parallel: bool = False,
        bias: bool = False,
        name: str = "",
        init: Initializer = DEFAULT_INITIALIZER,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.columns = tuple(columns)
        self.replica_groups = tuple(replica_group if c.replicas > 1 else None for c in columns)
        for column in columns:
            full_name = f"{name}.{column.name}" if name else column.name
            spec = cut_over(
                group,
                f"{full_name}.weight",
                (column.out_features, in_features),
                dim=0,
                replicas=column.replicas,
            )
            self.register_parameter(f"{column.name}_weight", sharded_parameter(spec, init, dtype))
            if bias:
                spec = cut_over(
                    group, f"{full_name}.bias", (column.out_features,), dim=0, replicas=column.replicas
                )
                zeros = sharded_parameter(spec, constant_initializer(0.0), dtype)
                self.register_parameter(f"{column.name}_bias", zeros)
            else:
                self.register_parameter(f"{column.name}_bias", None)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[s, b, i] (or [s/t, b, i] under sequence parallelism) -> one [s, b, o/t] a column."""
        weights = [getattr(self, f"{column.name}_weight") for column in self.columns]
        outputs = _ColumnLinear.apply(x, self.group, self.sequence_parallel, self.replica_groups, *weights)
        biases = [getattr(self, f"{column.name}_bias") for column in self.columns]
        return tuple(
            y if bias is None else y + copy_to_tp(bias, group)
            for y, bias, group in zip(outputs, biases, self.replica_groups, strict=True)
        )


class ColumnParallelLinear(nn.Module):
    """y[s, b, o/t] = x @ W_r.T + b_r, with rank r's rows of the weight; twin of torch.nn.Linear.

    Under sequence parallelism x is [s/t, b, i]. weight: an existing parameter to share (a tied
    embedding) in place of a new one.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group: Group = None,
        sequence_parallel: bool = False,
        bias: bool = False,
        weight: nn.Parameter | None = None,
        name: str = "linear",
        init: Initializer = DEFAULT_INITIALIZER,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.group = group
        self.sequence_parallel = sequence_parallel
        if weight is None:
            spec = cut_over(group, f"{name}.weight", (out_features, in_features), dim=0)
            weight = sharded_parameter(spec, init, dtype)
        self.weight = weight
        self.bias = None
        if bias:
            spec = cut_over(group, f"{name}.bias", (out_features,), dim=0)
            self.bias = sharded_parameter(spec, constant_initializer(0.0), dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (y,) = _ColumnLinear.apply(x, self.group, self.sequence_parallel, (None,), self.weight)
        return y if self.bias is None else y + self.bias


class RowParallelLinear(nn.Module):
    """y[s, b, o] = sum over ranks of x_r[s, b, i/t] @ W_r.T, plus b; twin of torch.nn.Linear.

    Under sequence parallelism y is [s/t, b, o]. The bias is added after the sum, once.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group: Group = None,
        sequence_parallel: bool = False,
        bias: bool = False,
        name: str = "linear",
        init: Initializer = DEFAULT_INITIALIZER,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.leave = scatter_sequence if sequence_parallel else reduce_from_tp
        spec = cut_over(group, f"{name}.weight", (out_features, in_features), dim=1)
        self.weight = sharded_parameter(spec, init, dtype)
        self.bias = None
        if bias:
            spec = replicated_over(group, f"{name}.bias", (out_features,))
            self.bias = sharded_parameter(spec, constant_initializer(0.0), dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.leave(_linear(x, self.weight), self.group)
        if self.bias is None:
            return y
        # Each rank adds the bias to its own part of the sequence, so its gradient is a part of the sum.
        return y + (copy_to_tp(self.bias, self.group) if self.sequence_parallel else self.bias)
