"""The gate of a feed-forward layer by name (SwiGLU: Shazeer 2020, arXiv 2002.05202): silu(gate) * up."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from megalite.kernels.package import liger

Gating = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def gate_by_torch(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Both [..., i]; autograd keeps gate, silu(gate) and up."""
    return F.silu(gate) * up


def gate_by_liger(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Liger's: keeps gate and up, and computes silu again in backward.

    It writes the gradients over what it kept. Nothing else may need the numbers of gate and up by then, and
    one backward is all that a forward has: so it is in the layers here.
    """
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # imports triton

    gated: torch.Tensor = LigerSiLUMulFunction.apply(gate, up)
    return gated


GATINGS: dict[str, Gating] = {"torch": gate_by_torch, "liger": gate_by_liger}
GATING_PACKAGES = {"liger": liger()}
