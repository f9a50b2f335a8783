"""Section `kernels`: what computes the parts of a layer."""

from typing import Literal

from pydantic import Field

from megalite.config.section import NonNegativeInt, Section


class KernelConfig(Section):
    """What computes the parts of a layer; `auto` is what serves the device best, told when the run starts."""

    attention: Literal["auto", "blocks", "sdpa", "flex"] = Field(
        "auto",
        description="Batched products on blocks of rows (fastest on a CPU), torch's "
        "scaled_dot_product_attention, or on a GPU FlexAttention where there are documents.",
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
