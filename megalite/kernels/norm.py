"""RMSNorm by name (Zhang 2019, arXiv 1910.07467): y = n * weight, n = x / sqrt(mean(x^2) + eps)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from megalite.kernels.package import apex, liger

Norm = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
# Liger's: nothing is added to the weight, all is in fp32 up to the end, dx gets memory of its own.
LIGER_MODES = (0.0, "gemma", False)


def norm_by_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """torch's rms_norm: fused on GPUs; on a CPU its backward is a dozen passes over x."""
    return F.rms_norm(x, weight.shape, weight, eps)


def norm_by_rows(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., h], weight [h]: the same in few passes; sums and the scale of a row are in fp32 at least."""
    return _RowNorm.apply(x, weight, eps)


def norm_by_apex(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """NVIDIA apex's FusedRMSNorm, x and weight of one dtype: on a CPU what it does there, in fp32 at most."""
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine, manual_rms_norm

    y: torch.Tensor
    if x.is_cuda:
        y = fused_rms_norm_affine(x, weight, weight.shape, eps)
    else:
        y = manual_rms_norm(x, weight.shape, weight, eps)
    return y


def norm_by_liger(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Liger's, rounded once, as torch's is. dx is not put over dy, which others may still need."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # imports triton

    y: torch.Tensor = LigerRMSNormFunction.apply(x, weight, eps, *LIGER_MODES)
    return y


def norm_of(device: torch.device) -> str:
    """The name of what serves a device best."""
    return "rows" if device.type == "cpu" else "torch"


NORMS: dict[str, Norm] = {
    "torch": norm_by_torch,
    "rows": norm_by_rows,
    "apex": norm_by_apex,
    "liger": norm_by_liger,
}
NORM_PACKAGES = {"apex": apex("normalization", "fused_layer_norm_cuda", on_cpu=True), "liger": liger()}


class _RowNorm(torch.autograd.Function):
    """With the scale of a row r = 1 / sqrt(mean(x^2) + eps) and g = dy * weight:

        dx = r g - r^3 x mean(g * x)        dweight = sum over rows of dy * r x

    torch's fused backward of LayerNorm gives both, if the mean is told to be 0, but for r mean(g): it takes
    that off for the mean's own gradient, so it is added again.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        wide_x = x.to(wide)  # once: operations on two formats are slow on a CPU
        norm = torch.linalg.vector_norm(wide_x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()
        ctx.dtype = x.dtype
        ctx.save_for_backward(x, weight, scale)
        return (wide_x * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        x, grad, wide_weight = (t.to(scale.dtype) for t in (x, grad, weight))
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight.shape, torch.zeros_like(scale), scale, wide_weight, None, [True, True, False]
        )
        dx.add_((grad @ wide_weight).unsqueeze(-1).mul_(scale).div_(x.size(-1)))
        return dx.to(ctx.dtype), dweight.to(weight.dtype), None
