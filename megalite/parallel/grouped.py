"""Matrix products of rows that come in groups, each group with a weight of its own.

Shapes: n rows, e groups, i input features, o output features. Rows of a group follow each other.
"""

from typing import Any

import torch
import torch.nn.functional as F

_GROUPED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ALIGNMENT_BYTES = 16  # of the rows that torch's grouped products read


def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, *, kernel: bool | None = None
) -> torch.Tensor:
    """y [n, o]: y_g = x_g @ W_g.T for each group g of rows x_g [counts[g], i], with W [e, o, i].

        dx_g = dy_g @ W_g      dW_g = dy_g.T @ x_g, zero for a group without rows

    counts: int64 [e], of sum n.
    kernel: whether torch's grouped product is used, or a loop; by default where it takes the tensors.
    """
    if kernel is None:
        kernel = has_kernel(x, weight)
    return _GroupedLinear.apply(x, weight, counts, kernel)


def has_kernel(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether torch multiplies these in one grouped product: their format, and rows that are aligned."""
    rows_bytes = [size * x.element_size() for size in weight.shape[1:]]
    aligned = not any(size % _ALIGNMENT_BYTES for size in rows_bytes)
    return aligned and x.dtype in _GROUPED_DTYPES and x.dtype == weight.dtype and x.size(0) > 0


class _GroupedLinear(torch.autograd.Function):
    """Keeps the weight itself, no view of it: ZeRO-3 lets the gathered weight go between its uses."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, kernel: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, counts)
        ctx.kernel = kernel
        return _rows_times(x, weight.transpose(1, 2), counts, kernel)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, counts = ctx.saved_tensors
        grad = grad.contiguous()  # the kernel refuses an expanded one
        grad_x = _rows_times(grad, weight, counts, ctx.kernel) if ctx.needs_input_grad[0] else None
        grad_weight = _outer(grad, x, counts, ctx.kernel) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None, None


def _rows_times(x: torch.Tensor, matrices: torch.Tensor, counts: torch.Tensor, kernel: bool) -> torch.Tensor:
    """[n, a] by [e, a, b] -> [n, b]."""
    if kernel:
        return F.grouped_mm(x, matrices, offs=_ends(counts))
    out = x.new_empty(x.size(0), matrices.size(2))
    sizes = counts.tolist()
    for rows, matrix, result in zip(x.split(sizes), matrices, out.split(sizes), strict=True):
        torch.mm(rows, matrix, out=result)
    return out


def _outer(grad: torch.Tensor, x: torch.Tensor, counts: torch.Tensor, kernel: bool) -> torch.Tensor:
    """[n, o] and [n, i] -> [e, o, i], each group's dy.T @ x."""
    if kernel:
        return F.grouped_mm(grad.T, x, offs=_ends(counts))
    out = grad.new_empty(counts.numel(), grad.size(1), x.size(1))
    sizes = counts.tolist()
    for rows, inputs, result in zip(grad.split(sizes), x.split(sizes), out, strict=True):
        torch.mm(rows.T, inputs, out=result)
    return out


def _ends(counts: torch.Tensor) -> torch.Tensor:
    return counts.cumsum(0).to(torch.int32)
