"""The three matrix products of a linear layer; another number format is another set of them.

Shapes: s sequence, b micro batch, i input features, o output features.
"""

from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class MatrixProducts:
    """A linear layer's forward product and its two gradients; by default in the tensors' own format."""

    output: Product = output
    input_gradient: Product = input_gradient
    weight_gradient: Product = weight_gradient
