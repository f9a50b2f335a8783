"""The gated feed-forward layer (SwiGLU: Shazeer 2020, arXiv 2002.05202)."""

import torch
import torch.nn.functional as F
from torch import nn

from megalite.config.model import ModelConfig
from megalite.model.layout import StageLayout
from megalite.parallel.linear import Column, MergedColumnLinear, RowParallelLinear
from megalite.parallel.shard import Initializer


class ParallelMLP(nn.Module):
    """x -> down_proj(silu(gate_proj x) * up_proj x); twin of Hugging Face's LlamaMLP."""

    def __init__(
        self,
        config: ModelConfig,
        layout: StageLayout,
        *,
        name: str,
        init: Initializer,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate_up = MergedColumnLinear(
            config.hidden_size,
            [Column("gate_proj", config.intermediate_size), Column("up_proj", config.intermediate_size)],
            group=layout.context.tp_group,
            sequence_parallel=layout.sequence_parallel,
            bias=config.mlp_bias,
            name=name,
            init=init,
            dtype=dtype,
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            group=layout.context.tp_group,
            sequence_parallel=layout.sequence_parallel,
            bias=config.mlp_bias,
            name=f"{name}.down_proj",
            init=init,
            dtype=dtype,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[s, b, h] (or [s/t, b, h] under sequence parallelism), the shape kept."""
        gate, up = self.gate_up(x)
        return self.down_proj(F.silu(gate) * up)
