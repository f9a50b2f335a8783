"""Low-rank adapters of linear layers that lie on many ranks (LoRA: Hu 2021, arXiv 2106.09685).

Shapes: s sequence, b micro batch, i input features, o output features, r rank, t tensor-parallel ranks.

    y = W x + scale B A x        A [r, i]    B [o, r]

An adapter's output is in the state of its layer's product: cut along o of a column layer, a part of a sum of
a row layer. One factor lies as the layer's weight does, the other is whole on every rank.

                A            B            what crosses ranks
    column      whole        [o/t, r]     u = A x, r numbers per token, where x is cut along the sequence
    row         [r, i/t]     whole        nothing: the parts are added before the layer's own sum

The whole factor sees a part of the sequence (column, under sequence parallelism) or of the sum over i (row),
so that its gradient is summed over ranks.
"""

import torch
from torch import nn

from megalite.parallel.column import local_linear
from megalite.parallel.mappings import copy_to_tp, gather_sequence
from megalite.parallel.plan import LayerPlan, Lora
from megalite.parallel.shard import (
    ShardSpec,
    constant_initializer,
    cut_spec,
    describe_shards,
    draw_like_linear,
    sharded_parameter,
    whole_spec,
)

LORA_A, LORA_B = "lora_A.weight", "lora_B.weight"  # PEFT's names, after the layer's


class _Adapter(nn.Module):
    """Both factors; A is drawn, B begins at zero, so that an untrained adapter changes nothing."""

    def __init__(self, plan: LayerPlan, a: ShardSpec, b: ShardSpec) -> None:
        super().__init__()
        self.plan = plan
        self.lora_A = sharded_parameter(a, plan.init or draw_like_linear, plan.dtype)
        self.lora_B = sharded_parameter(b, constant_initializer(0.0), plan.dtype)

    @property
    def scale(self) -> float:
        """What the product is multiplied with."""
        return _lora_of(self.plan).scale

    def extra_repr(self) -> str:
        return describe_shards(self)


class ColumnAdapter(_Adapter):
    """scale B_r A x for a column layer whose output is cut over `cut_over`.

        u  = x @ A.T, gathered along the sequence where x is cut    du   = sum over ranks of scale dy_r @ B_r
        dA = du.T @ x, summed over the ranks where x is cut         dB_r = scale dy_r.T @ u
        dx = du @ A

    dB_r is summed over the ranks that hold a copy of B_r, as the layer's weight gradient is.
    """

    def __init__(
        self, in_features: int, out_features: int, plan: LayerPlan, *, name: str, cut_over: str = "tp"
    ) -> None:
        rank = _lora_of(plan).rank
        shapes = (rank, in_features), (out_features, rank)
        a = whole_spec(plan.context, f"{name}.{LORA_A}", shapes[0], is_summed=plan.sequence_parallel)
        b = cut_spec(plan.context, f"{name}.{LORA_B}", shapes[1], 0, over=cut_over)
        super().__init__(plan, a, b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[s, b, i] (or [s/t, b, i] under sequence parallelism) -> [s, b, o/t]."""
        enter = gather_sequence if self.plan.sequence_parallel else copy_to_tp
        inner = enter(local_linear(x, self.plan, self.lora_A), self.plan.tp_group)
        return self.scale * local_linear(inner, self.plan, self.lora_B)


class RowAdapter(_Adapter):
    """scale B A_r x_r for a row layer: this rank's part of a sum over ranks, as the layer's product is.

    u_r  = x_r @ A_r.T                  du_r = scale dy @ B
    dA_r = du_r.T @ x_r                 dB   = sum over ranks of scale dy.T @ u_r
    dx_r = du_r @ A_r
    """

    def __init__(self, in_features: int, out_features: int, plan: LayerPlan, *, name: str) -> None:
        rank = _lora_of(plan).rank
        a = cut_spec(plan.context, f"{name}.{LORA_A}", (rank, in_features), 1)
        b = whole_spec(plan.context, f"{name}.{LORA_B}", (out_features, rank), is_summed=True)
        super().__init__(plan, a, b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[s, b, i/t] -> [s, b, o], to be summed over ranks."""
        return self.scale * local_linear(local_linear(x, self.plan, self.lora_A), self.plan, self.lora_B)


def _lora_of(plan: LayerPlan) -> Lora:
    assert plan.lora is not None
    return plan.lora
