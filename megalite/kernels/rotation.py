"""Heads turned by the angles of their positions (Su 2021, arXiv 2104.09864), in few passes over memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

Rotation = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [s, b, heads, D], with cos and sin [s, b or 1, 1, D] of its angles, which have no gradient.

    Dimension j turns with j + D/2: y = x * cos + (-second, first) * sin, the halves of x swapped.
    """
    return _Rotation.apply(x, cos, sin)


def rotate_by_formula(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The same as it is written, for a compiler."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class _Rotation(torch.autograd.Function):
    """Backward turns by the opposite angles."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    swapped = torch.cat([second, first], dim=-1)
    half = sin.size(-1) // 2
    signed = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
    return swapped.mul_(signed).addcmul_(x, cos)
