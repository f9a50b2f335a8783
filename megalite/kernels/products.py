"""The three matrix products of a linear layer by name; another number format is another set of them.

Shapes: s sequence, b micro batch, i input features, o output features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def output(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """y [s, b, o] = x [s, b, i] @ W.T, with W [o, i]."""
    return F.linear(x, weight)


def input_gradient(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """dx [s, b, i] = dy [s, b, o] @ W."""
    return grad @ weight


def weight_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dW [o, i] = dy.T @ x, over all s * b tokens."""
    return grad.flatten(0, -2).T @ x.flatten(0, -2)


def output_by_onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`output` by oneDNN, where it takes the tensors."""
    return _by_onednn(x, weight) if _is_for_onednn(x, weight) else output(x, weight)


def input_gradient_by_onednn(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`input_gradient` by oneDNN, where it takes the tensors."""
    return _by_onednn(grad, weight.T) if _is_for_onednn(grad, weight) else input_gradient(grad, weight)


def products_of(device: torch.device) -> str:
    """The name of what serves a device best, known by its kind: timing it could change a run that resumes."""
    return "onednn" if device.type == "cpu" and has_onednn() and _is_amd() else "torch"


def has_onednn() -> bool:
    """Whether this torch comes with oneDNN's products."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@dataclass(frozen=True)
class MatrixProducts:
    """A linear layer's forward product and its two gradients; by default in the tensors' own format."""

    output: Product = output
    input_gradient: Product = input_gradient
    weight_gradient: Product = weight_gradient


# Weights' gradients, sums over all tokens, are mostly no faster by oneDNN.
PRODUCTS: dict[str, MatrixProducts] = {
    "torch": MatrixProducts(),
    "onednn": MatrixProducts(output_by_onednn, input_gradient_by_onednn),
}


def _by_onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [..., i] @ weight [o, i].T: what torch.compile makes of a linear layer; it has no backward."""
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y


def _is_for_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """fp32 on a CPU, nothing empty; in bf16 torch's own products are oneDNN's."""
    return x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and weight.numel() > 0


def _is_amd() -> bool:
    """Whether the processor is AMD's, on which MKL, that multiplies fp32 in torch, is not at its best."""
    description = Path("/proc/cpuinfo")  # Linux's
    return description.exists() and "AuthenticAMD" in description.read_text()
