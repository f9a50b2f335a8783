"""Causal grouped-query attention with heads cut over the tensor-parallel ranks.

Shapes: s sequence, b micro batch, h hidden, A query heads, K key/value heads, D head size, t ranks.
With more ranks than key/value heads each head has copies on t/K neighbours, next to its query heads, and
its gradient is summed over them. The norm of heads is whole on every rank; its gradient is the sum over all
ranks, copies too, since each copy has the gradient of its own query heads only.
"""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megalite.config.model import ModelConfig
from megalite.model.logit_peaks import LogitPeaks
from megalite.model.rope import RotaryEmbedding
from megalite.model.spans import AttentionSpans
from megalite.parallel.linear import Column, MergedColumnLinear, RowParallelLinear
from megalite.parallel.norm import ParallelRMSNorm
from megalite.parallel.plan import LayerPlan


def kv_copies(num_key_value_heads: int, tp_size: int) -> int:
    """Tensor-parallel neighbours that hold the same key/value head."""
    return max(1, tp_size // num_key_value_heads)


class ParallelAttention(nn.Module):
    """x -> o_proj(attention(q_proj x, k_proj x, v_proj x)); twin of Hugging Face's LlamaAttention.

    With use_qk_norm, attention(q_norm(q_proj x), k_norm(k_proj x), v_proj x), the norms within each head;
    twin of Qwen3Attention.
    """

    def __init__(
        self,
        config: ModelConfig,
        rotary: RotaryEmbedding,
        plan: LayerPlan,
        *,
        name: str,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.rotary = rotary
        self.head_dim = config.head_dim
        self.kernels, self.recompute = plan.kernels, recompute
        self.peaks: LogitPeaks | None = None  # of the logits in training, where someone asks for them
        width = config.hidden_size
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        columns = [
            Column("q_proj", query_size),
            Column("k_proj", key_size, cut_over="kv"),
            Column("v_proj", key_size, cut_over="kv"),
        ]
        self.qkv = MergedColumnLinear(width, columns, plan, bias=config.attention_bias, name=name)
        self.o_proj = RowParallelLinear(
            query_size, width, plan, bias=config.attention_out_bias, name=f"{name}.o_proj"
        )
        self.q_norm: ParallelRMSNorm | None = None
        self.k_norm: ParallelRMSNorm | None = None
        if config.use_qk_norm:
            of_heads = partial(
                ParallelRMSNorm, config.head_dim, plan, eps=config.rms_norm_eps, sees_heads=True
            )
            self.q_norm, self.k_norm = of_heads(name=f"{name}.q_norm"), of_heads(name=f"{name}.k_norm")

    def forward(self, x: torch.Tensor, spans: AttentionSpans | None = None) -> torch.Tensor:
        """[s, b, h] (or [s/t, b, h] under sequence parallelism), the shape kept."""
        query, key, value = (y.unflatten(-1, (-1, self.head_dim)) for y in self.qkv(x))
        if self.recompute and torch.is_grad_enabled():
            mixed = checkpoint(self._attend, query, key, value, spans, use_reentrant=False)
        else:
            mixed = self._attend(query, key, value, spans)
        return self.o_proj(mixed)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        spans: AttentionSpans | None,
    ) -> torch.Tensor:
        """query [s, b, A/t, D], key and value [s, b, K/t, D] -> [s, b, A/t * D]."""
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        cos, sin = self.rotary.tables(query, *((spans.positions, spans.num_positions) if spans else ()))
        rotate = self.kernels.rotation
        query, key, value = (
            x.permute(1, 2, 0, 3) for x in (rotate(query, cos, sin), rotate(key, cos, sin), value)
        )
        if self.peaks is not None and self.training:
            self.peaks.see(query, key, spans)
        attend = self.kernels.attention
        mixed = spans.attend(query, key, value, attend) if spans else attend(query, key, value, None)
        return mixed.permute(2, 0, 1, 3).flatten(2)
