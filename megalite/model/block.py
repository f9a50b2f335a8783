"""One decoder layer: pre-norm attention and pre-norm feed-forward, each with its residual."""

import torch
from torch import nn

from megalite.config.model import ModelConfig
from megalite.model.attention import ParallelAttention
from megalite.model.documents import Documents
from megalite.model.layout import StageLayout
from megalite.model.mlp import ParallelMLP
from megalite.model.rope import RotaryEmbedding
from megalite.parallel.norm import ParallelRMSNorm
from megalite.parallel.shard import Initializer


class DecoderBlock(nn.Module):
    """x + attention(norm x), then x + mlp(norm x); twin of Hugging Face's LlamaDecoderLayer."""

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

        def norm(part: str) -> ParallelRMSNorm:
            return ParallelRMSNorm(
                config.hidden_size,
                eps=config.rms_norm_eps,
                group=layout.context.tp_group,
                sequence_parallel=layout.sequence_parallel,
                name=f"{name}.{part}",
                dtype=dtype,
            )

        self.input_layernorm = norm("input_layernorm")
        self.self_attn = ParallelAttention(
            config, rotary, layout, name=f"{name}.self_attn", init=init, dtype=dtype
        )
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.mlp = ParallelMLP(config, layout, name=f"{name}.mlp", init=init, dtype=dtype)

    def forward(self, x: torch.Tensor, documents: Documents | None = None) -> torch.Tensor:
        """[s, b, h] (or [s/t, b, h] under sequence parallelism), the shape kept."""
        x = x + self.self_attn(self.input_layernorm(x), documents)
        return x + self.mlp(self.post_attention_layernorm(x))
