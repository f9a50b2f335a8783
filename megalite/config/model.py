"""The shape of a Llama decoder, under the field names of Hugging Face's LlamaConfig."""

from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from megalite.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section


class RopeScalingConfig(Section):
    """How rotary frequencies are stretched beyond the context that they were trained for."""

    rope_type: Literal["linear", "llama3"] = Field(description="Rule that stretches the frequencies.")
    factor: float = Field(ge=1, description="Context extension, as a ratio of the original length.")
    low_freq_factor: PositiveFloat | None = Field(
        None, description="llama3: original length / this is the wavelength above which all is stretched."
    )
    high_freq_factor: PositiveFloat | None = Field(
        None, description="llama3: original length / this is the wavelength below which nothing is stretched."
    )
    original_max_position_embeddings: PositiveInt | None = Field(
        None, description="llama3: context of the first training, in tokens."
    )

    @model_validator(mode="after")
    def _llama3_is_complete(self) -> Self:
        extra = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        given = [name for name in extra if getattr(self, name) is not None]
        if self.rope_type == "linear" and given:
            raise ValueError(f"rope_type 'linear' takes no {', '.join(given)}: remove it or use 'llama3'")
        if self.rope_type == "llama3" and len(given) < len(extra):
            missing = [name for name in extra if name not in given]
            raise ValueError(f"rope_type 'llama3' needs {', '.join(missing)}: add it")
        if self.low_freq_factor and self.high_freq_factor and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor} must be below "
                f"high_freq_factor {self.high_freq_factor}"
            )
        return self


class ModelConfig(Section):
    """A Llama decoder: RMSNorm, rotary positions, grouped-query attention, gated MLP, or experts of them.

    Experts have the field names of Hugging Face's Glm4MoeConfig, and of DeepSeek's where that has none.
    """

    vocab_size: PositiveInt = Field(257, description="Rows of the embedding, in tokens, before any padding.")
    hidden_size: PositiveInt = Field(192, description="Width of the residual stream, in features.")
    intermediate_size: PositiveInt = Field(640, description="Width of the gated MLP, in features.")
    num_hidden_layers: PositiveInt = Field(4, description="Number of decoder layers.")
    num_attention_heads: PositiveInt = Field(8, description="Number of query heads in each layer.")
    num_key_value_heads: PositiveInt = Field(
        4, description="Number of key and value heads in each layer; null means one for each query head."
    )
    head_dim: PositiveInt = Field(
        None,  # filled in by the validator below
        validate_default=True,
        description="Width of one head, in features; null means hidden_size / num_attention_heads.",
    )
    hidden_act: Literal["silu"] = Field("silu", description="Activation of the MLP's gate.")
    max_position_embeddings: PositiveInt = Field(256, description="Longest context, in tokens.")
    initializer_range: NonNegativeFloat = Field(
        0.02, description="Standard deviation of the initial weights."
    )
    rms_norm_eps: PositiveFloat = Field(1e-5, description="Added to the mean square in RMSNorm.")
    tie_word_embeddings: bool = Field(
        False, description="Whether the output layer is the embedding's own weight."
    )
    attention_bias: bool = Field(
        False, description="Whether attention's query, key and value projections have biases."
    )
    attention_out_bias: bool = Field(
        None,  # filled in by the validator below
        validate_default=True,
        description="Whether attention's output projection has one; null means as attention_bias.",
    )
    use_qk_norm: bool = Field(
        False, description="Whether each query and key head is normalised, by RMSNorm, before its rotation."
    )
    mlp_bias: bool = Field(False, description="Whether the MLP's three projections have biases.")
    rope_theta: PositiveFloat = Field(10000.0, description="Base of the rotary frequencies.")
    rope_scaling: RopeScalingConfig | None = Field(
        None, description="Stretching of the rotary frequencies; null means none."
    )
    n_routed_experts: NonNegativeInt = Field(
        0, description="Experts among which a router chooses for each token; 0 means a dense model."
    )
    num_experts_per_tok: PositiveInt = Field(2, description="Routed experts that each token goes to.")
    n_shared_experts: NonNegativeInt = Field(
        0, description="Experts that every token goes to: one MLP of so many times an expert's width."
    )
    moe_intermediate_size: PositiveInt | None = Field(None, description="Width of one expert, in features.")
    first_k_dense_replace: NonNegativeInt = Field(
        0, description="Number of first layers that have a dense MLP in place of experts."
    )
    scoring_func: Literal["sigmoid", "softmax"] = Field(
        "sigmoid", description="How a router's logits become scores, from which gates are made."
    )
    norm_topk_prob: bool = Field(True, description="Whether the gates of a token are scaled to a sum of 1.")
    routed_scaling_factor: PositiveFloat = Field(1.0, description="Multiplies the gates.")
    router_aux_loss_coef: NonNegativeFloat = Field(
        0.0, description="Weight of the balancing loss of each layer's router, per sample; 0 means none."
    )
    bos_token_id: NonNegativeInt | None = Field(None, description="Token that begins a text, if any.")
    eos_token_id: NonNegativeInt | None = Field(None, description="Token that ends a document, if any.")
    pad_token_id: NonNegativeInt | None = Field(None, description="Token that fills a batch, if any.")

    @field_validator("num_key_value_heads", mode="before")
    @classmethod
    def _one_for_each_query_head(cls, value: Any, info: ValidationInfo) -> Any:
        return info.data.get("num_attention_heads") if value is None else value

    @field_validator("attention_out_bias", mode="before")
    @classmethod
    def _as_the_others(cls, value: Any, info: ValidationInfo) -> Any:
        return info.data.get("attention_bias", False) if value is None else value

    @field_validator("head_dim", mode="before")
    @classmethod
    def _heads_share_the_width(cls, value: Any, info: ValidationInfo) -> Any:
        hidden, heads = info.data.get("hidden_size"), info.data.get("num_attention_heads")
        if value is not None or hidden is None or heads is None:
            return 1 if value is None else value  # 1 stands in where the width itself was refused
        if hidden % heads:
            raise ValueError(
                f"hidden_size {hidden} is not divisible by num_attention_heads {heads}: "
                f"change one, or set head_dim"
            )
        return hidden // heads

    def has_experts(self, layer: int) -> bool:
        """Whether a decoder layer has routed experts in place of the dense MLP."""
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the shared experts, which are one MLP; 0 where there are none."""
        return self.n_shared_experts * (self.moe_intermediate_size or 0)

    @model_validator(mode="after")
    def _experts_fit(self) -> Self:
        experts, chosen = self.n_routed_experts, self.num_experts_per_tok
        if not experts:
            if self.n_shared_experts or self.moe_intermediate_size:
                raise ValueError("there are experts' sizes and n_routed_experts 0: set n_routed_experts")
            return self
        if self.moe_intermediate_size is None:
            width = "n_routed_experts and n_shared_experts" if self.n_shared_experts else "n_routed_experts"
            raise ValueError(f"{width} have no width: set moe_intermediate_size")
        if experts < max(2, chosen):
            raise ValueError(
                f"n_routed_experts {experts} is fewer than num_experts_per_tok {chosen} or than 2: "
                "use more experts, or choose fewer of them"
            )
        if self.first_k_dense_replace >= self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace {self.first_k_dense_replace} leaves no layer of num_hidden_layers "
                f"{self.num_hidden_layers} to the experts: lower it, or set n_routed_experts=0"
            )
        if chosen == 1 and self.norm_topk_prob:
            raise ValueError(
                "the gate of num_experts_per_tok 1 is always 1 with norm_topk_prob, and the router would "
                "learn nothing: set norm_topk_prob=false"
            )
        if self.mlp_bias:
            raise ValueError("experts have no biases: set mlp_bias=false")
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(
                f"num_attention_heads {heads} is not divisible by num_key_value_heads {kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary positions need pairs of features")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(self, name)
            if token is not None and token >= self.vocab_size:
                raise ValueError(f"{name} {token} is outside the vocabulary of vocab_size {self.vocab_size}")
        return self
