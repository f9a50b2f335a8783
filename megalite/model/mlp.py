"""The gated feed-forward layer (SwiGLU: Shazeer 2020, arXiv 2002.05202)."""

import torch
import torch.nn.functional as F
from torch import nn

from megalite.config.model import ModelConfig
from megalite.parallel.linear import Column, MergedColumnLinear, RowParallelLinear
from megalite.parallel.plan import LayerPlan


class ParallelMLP(nn.Module):
    """x -> down_proj(silu(gate_proj x) * up_proj x); twin of Hugging Face's LlamaMLP."""

    def __init__(
        self, config: ModelConfig, plan: LayerPlan, *, name: str, intermediate_size: int | None = None
    ) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.mlp_bias
        inner = intermediate_size or config.intermediate_size
        columns = [Column("gate_proj", inner), Column("up_proj", inner)]
        self.gate_up = MergedColumnLinear(width, columns, plan, bias=bias, name=name)
        self.down_proj = RowParallelLinear(inner, width, plan, bias=bias, name=f"{name}.down_proj")

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        """[s, b, h] (or [s/t, b, h] under sequence parallelism), the shape kept; padding changes nothing."""
        gate, up = self.gate_up(x)
        return self.down_proj(F.silu(gate) * up)
