"""Section `kernels`: what computes the parts of a layer."""

from typing import Literal

from pydantic import Field

from megalite.config.section import ConfigError, NonNegativeInt, Section


class KernelConfig(Section):
    """What computes the parts of a layer; `auto` is what serves the device best, told when the run starts."""

    attention: Literal["auto", "blocks", "sdpa", "flex", "varlen"] = Field(
        "auto",
        description="Batched products on blocks of rows (fastest on a CPU), torch's "
        "scaled_dot_product_attention, or on a GPU, where there are documents, "
        "FlexAttention, or FlashAttention over their lengths (bf16, fp16).",
    )
    attention_kept_tokens: NonNegativeInt | None = Field(
        None,
        description="Blocks: the longest sample, in tokens, whose attention probabilities are kept for "
        "backward, which computes those of longer ones again; null means short ones, where they take about "
        "as much memory as the other activations.",
    )
    norm: Literal["auto", "rows", "torch", "apex", "liger"] = Field(
        "auto",
        description="RMSNorm in few passes over memory (fastest on a CPU), torch's rms_norm, that of "
        "NVIDIA's apex, or on a GPU that of Liger Kernel.",
    )
    products: Literal["auto", "torch", "onednn"] = Field(
        "auto",
        description="Matrix products of linear layers by torch, or in fp32 on a CPU by oneDNN, which on "
        "AMD's is faster than what torch takes.",
    )
    gating: Literal["auto", "torch", "liger"] = Field(
        "auto",
        description="silu(gate) * up as torch computes it, or on a GPU that of Liger Kernel, which keeps two "
        "tensors of them for backward and not three.",
    )
    compile_blocks: bool = Field(
        False,
        description="Whether torch.compile makes what lies between a block's matrix products, in training: "
        "rotation, and norms and gating unless named; on a CPU it needs a C++ compiler and Python.h.",
    )

    def check_precision(self, precision: str) -> None:
        """Raise ConfigError for a precision of the DeepSpeed JSON in which a kernel does not compute."""
        if self.attention == "varlen" and precision == "fp32":
            raise ConfigError(
                f"kernels.attention varlen computes in bf16 or fp16 and the DeepSpeed JSON says {precision}: "
                "enable bf16 there, or set kernels.attention=auto"
            )
