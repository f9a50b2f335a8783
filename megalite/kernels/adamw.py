"""AdamW's update by name (Loshchilov 2017, arXiv 1711.05101), where another package computes it.

m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) g^2
w <- w - rate (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + decay w)
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from megalite.kernels.package import apex

CHUNK = 2048 * 32  # elements of a block of apex's kernel, as its own optimizer has it
DECOUPLED, CORRECTED = 1, 1  # apex's modes: decay apart from the gradient, means without their bias


class AdamTensors(NamedTuple):
    """Of each tensor that is stepped: gradient, parameter and its two running means, all alike in shape."""

    gradients: list[torch.Tensor]
    parameters: list[torch.Tensor]
    means: list[torch.Tensor]
    square_means: list[torch.Tensor]


class AdamRule(NamedTuple):
    """The numbers of an update; t counts it, from 1."""

    rate: float
    beta1: float
    beta2: float
    epsilon: float
    decay: float
    t: int


AdamUpdate = Callable[[AdamTensors, AdamRule], None]


def update_by_apex(tensors: AdamTensors, rule: AdamRule) -> None:
    """The kernel of apex's FusedAdam: all tensors, of one device, in one launch. It computes in fp32."""
    import amp_C

    no_overflow = torch.zeros(1, dtype=torch.int32, device=tensors.parameters[0].device)
    numbers = (rule.rate, rule.beta1, rule.beta2, rule.epsilon, rule.t, DECOUPLED, CORRECTED, rule.decay)
    amp_C.multi_tensor_adam(CHUNK, no_overflow, [list(kind) for kind in tensors], *numbers)


# None: torch's own optimizer, fused.
ADAMW: dict[str, AdamUpdate | None] = {"torch": None, "apex": update_by_apex}
ADAMW_PACKAGES = {"apex": apex("optimizers", "amp_C", on_cpu=False)}
