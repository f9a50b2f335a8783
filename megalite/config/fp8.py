"""Whether the matrix products of linear layers are rounded to 8 bits, and what they then ask of the model."""

from typing import Literal

from pydantic import Field

from megalite.config.model import ModelConfig
from megalite.config.section import ConfigError, Section

MULTIPLE = 16  # of sizes that GPUs multiply in fp8


class Fp8Config(Section):
    """Products of linear layers in 8-bit floating point; weights and activations stay bf16 (docs/fp8.md)."""

    recipe: Literal["none", "tensorwise", "rowwise", "rowwise_with_gw_hp"] = Field(
        "none",
        description="Not; with one scale for each tensor (fastest), with one for each row (more exact), or "
        "so with the gradients of weights in bf16 (most exact). Names and formats are torchao's. Embedding, "
        "head, routers, routed experts and adapters stay as they are.",
    )

    def check_precision(self, precision: str) -> None:
        """Raise ConfigError for a precision of the DeepSpeed JSON that nothing is rounded from.

        fp32 is for CPUs, to see what rounding does; a GPU refuses it (parallel/fp8.py).
        """
        if self.recipe != "none" and precision == "fp16":
            raise ConfigError(
                f"fp8.recipe {self.recipe} rounds bf16 and the DeepSpeed JSON says {precision}: enable bf16 "
                "there, or set fp8.recipe=none"
            )

    def check_sizes(self, model: ModelConfig, tp_size: int, micro_batch_tokens: int) -> None:
        """Raise ConfigError for a size of the layers that is no multiple of 16 on a rank.

        micro_batch_tokens: of a micro batch on one rank of context parallelism.
        """
        if self.recipe == "none":
            return
        layers = range(model.num_hidden_layers)
        with_experts = any(map(model.has_experts, layers))
        sizes = {
            "hidden_size": model.hidden_size,
            "num_attention_heads x head_dim": model.num_attention_heads * model.head_dim // tp_size,
            "num_key_value_heads x head_dim": max(1, model.num_key_value_heads // tp_size) * model.head_dim,
        }
        if not all(map(model.has_experts, layers)):
            sizes["intermediate_size"] = model.intermediate_size // tp_size
        if with_experts and model.shared_intermediate_size:
            sizes["moe_intermediate_size x n_shared_experts"] = model.shared_intermediate_size // tp_size
        for name, size in sizes.items():
            if size % MULTIPLE:
                of_rank = "" if name == "hidden_size" else f" on each of parallel.tp_size {tp_size} ranks"
                raise ConfigError(
                    f"fp8.recipe {self.recipe} needs multiples of {MULTIPLE} and model.{name} makes "
                    f"{size}{of_rank}: change it, or set fp8.recipe=none"
                )
        if self.recipe != "rowwise_with_gw_hp" and micro_batch_tokens % MULTIPLE:
            raise ConfigError(
                f"fp8.recipe {self.recipe} needs multiples of {MULTIPLE} and a micro batch has "
                f"{micro_batch_tokens} tokens on a rank: change train_micro_batch_size_per_gpu or "
                "data.seq_length, or set fp8.recipe=rowwise_with_gw_hp"
            )
