"""Weights that backward does not read, and that ZeRO-3 therefore need not gather for it.

An embedding's gradient counts rows; a head whose losses were summed made its gradients in forward. Both are
the largest tensors of a model. Read from DeepSpeed 0.19.8.
"""

from typing import Any

import torch
from torch import nn

MARK = "reads_weight_in_backward"  # what a module calls its answer, of its last forward


def leave_unread_weights(module: nn.Module) -> None:
    """Let backward gather nothing for modules that read no weight in it; after DeepSpeed has hung its hooks.

    Their parameters then take gradients while they are not there.
    """
    parts = [part for part in module.modules() if hasattr(part, MARK)]
    for part in parts:
        part.pre_bwd_fn = _FetchWhereRead(part, part.pre_bwd_fn)  # type: ignore[assignment]
    for parameter in {
        parameter for part in parts for parameter in part.parameters() if parameter.requires_grad
    }:
        stand_in = _StandIn(parameter)
        parameter.register_hook(stand_in.come)
        parameter.register_post_accumulate_grad_hook(stand_in.leave)


def shape_alone(parameter: Any) -> torch.Tensor:
    """For a parameter that ZeRO-3 let go of: one zero, repeated without memory, which nobody reads."""
    return parameter.data.new_zeros(1).expand(parameter.ds_shape)


class _FetchWhereRead:
    """DeepSpeed's mark on a module's output, at which backward gathers its weights; where it reads them."""

    def __init__(self, module: nn.Module, mark: Any) -> None:
        self._module, self._mark = module, mark

    def apply(self, output: torch.Tensor) -> torch.Tensor:
        return self._mark.apply(output) if getattr(self._module, MARK) else output


class _StandIn:
    """What a parameter is while a gradient is added to it: autograd looks at its strides."""

    def __init__(self, parameter: Any) -> None:
        self._parameter = parameter
        self._released: torch.Tensor | None = None

    def come(self, grad: torch.Tensor) -> None:
        self._released = None
        if self._parameter.shape != self._parameter.ds_shape:
            self._released, self._parameter.data = self._parameter.data, shape_alone(self._parameter)

    def leave(self, parameter: torch.Tensor) -> None:
        """Behind DeepSpeed's own hook, which reduces the gradient."""
        if self._released is not None:
            parameter.data, self._released = self._released, None
