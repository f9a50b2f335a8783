"""Causal grouped-query attention with heads cut over the tensor-parallel ranks.

Shapes: s sequence, b micro batch, h hidden, A query heads, K key/value heads, D head size, t ranks.
With more ranks than key/value heads each head lives on t/K neighbours, next to its query heads, and
its gradient is summed over them.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from megalite.config.model import ModelConfig
from megalite.model.documents import Documents
from megalite.model.layout import StageLayout
from megalite.model.rope import RotaryEmbedding, rotate
from megalite.parallel.linear import Column, MergedColumnLinear, RowParallelLinear
from megalite.parallel.shard import Initializer


def kv_replicas(num_key_value_heads: int, tp_size: int) -> int:
    """Tensor-parallel neighbours that hold the same key/value head."""
    return max(1, tp_size // num_key_value_heads)


class ParallelAttention(nn.Module):
    """x -> o_proj(attention(q_proj x, k_proj x, v_proj x)); twin of Hugging Face's LlamaAttention."""

    def __init__(
        self,
        config: ModelConfig,
        rotary: RotaryEmbedding,
        layout: StageLayout,
        *,
        name: str,
        init: Initializer,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.rotary = rotary
        self.head_dim = config.head_dim
        self.recompute = layout.recompute == "selective"
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        replicas = kv_replicas(config.num_key_value_heads, layout.context.tp_size)
        self.qkv = MergedColumnLinear(
            config.hidden_size,
            [
                Column("q_proj", query_size),
                Column("k_proj", key_size, replicas),
                Column("v_proj", key_size, replicas),
            ],
            group=layout.context.tp_group,
            replica_group=layout.context.replica_group,
            sequence_parallel=layout.sequence_parallel,
            bias=config.attention_bias,
            name=name,
            init=init,
            dtype=dtype,
        )
        self.o_proj = RowParallelLinear(
            query_size,
            config.hidden_size,
            group=layout.context.tp_group,
            sequence_parallel=layout.sequence_parallel,
            bias=config.attention_bias,
            name=f"{name}.o_proj",
            init=init,
            dtype=dtype,
        )

    def forward(self, x: torch.Tensor, documents: Documents | None = None) -> torch.Tensor:
        """[s, b, h] (or [s/t, b, h] under sequence parallelism), the shape kept."""
        query, key, value = (y.unflatten(-1, (-1, self.head_dim)) for y in self.qkv(x))
        if self.recompute and torch.is_grad_enabled():
            mixed = checkpoint(self._attend, query, key, value, documents, use_reentrant=False)
        else:
            mixed = self._attend(query, key, value, documents)
        return self.o_proj(mixed)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        documents: Documents | None,
    ) -> torch.Tensor:
        """query [s, b, A/t, D], key and value [s, b, K/t, D] -> [s, b, A/t * D]."""
        cos, sin = self.rotary.tables(query, documents.positions if documents else None)
        query, key, value = (
            x.permute(1, 2, 0, 3) for x in (rotate(query, cos, sin), rotate(key, cos, sin), value)
        )
        if documents:
            mixed = documents.attend(query, key, value)
        else:
            grouped = query.size(1) != key.size(1)
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        return mixed.permute(2, 0, 1, 3).flatten(2)
