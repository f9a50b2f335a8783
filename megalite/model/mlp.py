"""The gated feed-forward layer (SwiGLU: Shazeer 2020, arXiv 2002.05202)."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megalite.config.model import ModelConfig
from megalite.parallel.linear import Column, MergedColumnLinear, RowParallelLinear
from megalite.parallel.plan import LayerPlan


class ParallelMLP(nn.Module):
    """x -> down_proj(silu(gate_proj x) * up_proj x); twin of Hugging Face's LlamaMLP.

    Each token goes through by itself. So where the plan has `tile_tokens`, a rank takes as many at a time,
    and backward computes each tile again before its gradients: besides input and output, a rank then holds
    `tile_tokens` x 3 x intermediate_size / t numbers, whatever the length. The gradient of a weight is the
    sum over tiles, dW = sum_i dY_i^T X_i, which autograd adds up in the weight's own format.
    """

    def __init__(
        self, config: ModelConfig, plan: LayerPlan, *, name: str, intermediate_size: int | None = None
    ) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.mlp_bias
        inner = intermediate_size or config.intermediate_size
        columns = [Column("gate_proj", inner), Column("up_proj", inner)]
        self.gate_up = MergedColumnLinear(width, columns, plan, bias=bias, name=name)
        self.down_proj = RowParallelLinear(inner, width, plan, bias=bias, name=f"{name}.down_proj")
        self._tile_rows = plan.tile_tokens // (plan.context["tp"].size if plan.sequence_parallel else 1)
        self._has_tiles = plan.tile_tokens > 0
        self._gating = plan.kernels.gating

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        """[s, b, h] (or [s/t, b, h] under sequence parallelism), the shape kept; padding changes nothing."""
        tiles = x.split(max(1, self._tile_rows // x.size(1))) if self._has_tiles else (x,)
        if len(tiles) == 1:
            return self._tile(x)
        if not torch.is_grad_enabled():
            return torch.cat([self._tile(tile) for tile in tiles])
        return torch.cat([checkpoint(self._tile, tile, use_reentrant=False) for tile in tiles])

    def _tile(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x)
        return self.down_proj(self._gating(gate, up))
