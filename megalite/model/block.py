"""One decoder layer: pre-norm attention and pre-norm feed-forward, each with its residual."""

import torch
from torch import nn

from megalite.config.model import ModelConfig
from megalite.model.attention import ParallelAttention
from megalite.model.mlp import ParallelMLP
from megalite.model.moe import MixtureOfExperts
from megalite.model.rope import RotaryEmbedding
from megalite.model.spans import AttentionSpans
from megalite.parallel.norm import ParallelRMSNorm
from megalite.parallel.plan import LayerPlan


class DecoderBlock(nn.Module):
    """x + attention(norm x), then x + mlp(norm x); twin of Hugging Face's LlamaDecoderLayer.

    has_experts: the MLP is a mixture of experts; twin of Glm4MoeDecoderLayer.
    """

    def __init__(
        self,
        config: ModelConfig,
        rotary: RotaryEmbedding,
        plan: LayerPlan,
        *,
        name: str,
        has_experts: bool = False,
        recompute_attention: bool = False,
    ) -> None:
        super().__init__()

        def norm(part: str) -> ParallelRMSNorm:
            return ParallelRMSNorm(config.hidden_size, plan, eps=config.rms_norm_eps, name=f"{name}.{part}")

        self.input_layernorm = norm("input_layernorm")
        self.self_attn = ParallelAttention(
            config, rotary, plan, name=f"{name}.self_attn", recompute=recompute_attention
        )
        self.post_attention_layernorm = norm("post_attention_layernorm")
        kind = MixtureOfExperts if has_experts else ParallelMLP
        self.mlp = kind(config, plan, name=f"{name}.mlp")

    def forward(
        self, x: torch.Tensor, spans: AttentionSpans | None = None, padding: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[s, b, h] (or [s/t, b, h] under sequence parallelism), the shape kept; padding bool [s, b]."""
        x = x + self.self_attn(self.input_layernorm(x), spans=spans)
        return x + self.mlp(self.post_attention_layernorm(x), padding=padding)
