"""Linear layers in fp8 written out in one process: cast there and back, multiply in float64."""

from functools import partial

import torch
from torch import nn

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}


def there_and_back(
    x: torch.Tensor, dtype: torch.dtype, over: int | None, power_of_two: bool = True
) -> torch.Tensor:
    """x [a, b] as it is in 8 bits; its scale is by the largest value over a dimension, None for all of it."""
    peak = x.abs().max() if over is None else x.abs().max(over, keepdim=True).values
    scale = LARGEST[dtype] / peak.float().clamp(min=1e-30)  # a first token's query has no gradient at all
    if power_of_two:
        scale = 2.0 ** scale.log2().floor()
    return (x.float() * scale).to(dtype).double() / scale.double()


class WrittenOut(torch.autograd.Function):
    """y [n, o] = x [n, i] @ W [o, i].T by a recipe; torchao's float8_linear.py says the same."""

    @staticmethod
    def forward(ctx, x, weight, recipe):
        ctx.recipe = recipe
        ctx.save_for_backward(x, weight)
        if recipe == "tensorwise":
            y = there_and_back(x, E4M3, None, False) @ there_and_back(weight, E4M3, None, False).T
        else:
            y = there_and_back(x, E4M3, 1) @ there_and_back(weight, E4M3, 1).T
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        if ctx.recipe == "tensorwise":
            grad_8 = there_and_back(grad, E5M2, None, False)
            grad_x = grad_8 @ there_and_back(weight, E4M3, None, False)
            grad_weight = grad_8.T @ there_and_back(x, E4M3, None, False)
        elif ctx.recipe == "rowwise":
            grad_x = there_and_back(grad, E4M3, 1) @ there_and_back(weight, E4M3, 0)
            grad_weight = there_and_back(grad, E4M3, 0).T @ there_and_back(x, E4M3, 0)
        else:
            grad_x = there_and_back(grad, E4M3, 1) @ there_and_back(weight, E4M3, None)
            grad_weight = grad.T @ x
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def linear(x: torch.Tensor, weight: torch.Tensor, recipe: str) -> torch.Tensor:
    """[..., i] and [o, i] to [..., o]."""
    return WrittenOut.apply(x.flatten(0, -2), weight, recipe).unflatten(0, x.shape[:-1])


def with_fp8(llama: nn.Module, recipe: str) -> nn.Module:
    """transformers' model whose layers' nn.Linear are these; head, embedding, routers and experts stay."""
    for module in llama.model.layers.modules():
        if isinstance(module, nn.Linear):
            assert module.bias is None
            module.forward = partial(linear, weight=module.weight, recipe=recipe)
    return llama
