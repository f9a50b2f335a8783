"""AdamW's update by name (Loshchilov 2017, arXiv 1711.05101), where another package computes it.

m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) g^2
w <- w - rate (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + decay w)
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from megalite.kernels.package import Source, apex

CHUNK = 2048 * 32  # elements of a block of the kernel, as apex's own optimizer has it
DECOUPLED, CORRECTED = 1, 1  # the kernel's modes: decay apart from the gradient, means without their bias


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

    _update(amp_C.multi_tensor_adam, tensors, rule)


def update_by_deepspeed(tensors: AdamTensors, rule: AdamRule) -> None:
    """The kernel of DeepSpeed's FusedAdam for its accelerator: on a CPU vectorised by hand, on a GPU apex's.

    On a CPU it multiplies up the powers of beta from step to step, and begins with their exact values in
    a run that resumes, which would step otherwise. So the means go in without their correction:

        c1 = 1 - beta1^t, c2 = sqrt(1 - beta2^t): rate' = rate c2 / c1, eps' = eps c2, decay' = decay c1 / c2
    """
    c1, c2 = 1 - rule.beta1**rule.t, (1 - rule.beta2**rule.t) ** 0.5
    corrected = rule._replace(rate=rule.rate * c2 / c1, epsilon=rule.epsilon * c2, decay=rule.decay * c1 / c2)
    _update(_deepspeeds_kernel(), tensors, corrected, correction=0)


@cache
def _deepspeeds_kernel() -> Any:
    """Compiled at its first use, once for all runs of a user: then it is loaded, and from then on there."""
    from deepspeed.ops.op_builder import FusedAdamBuilder

    return FusedAdamBuilder().load(verbose=False).multi_tensor_adam


def _update(kernel: Any, tensors: AdamTensors, rule: AdamRule, correction: int = CORRECTED) -> None:
    """Kernels of one signature, whatever computes in them."""
    no_overflow = torch.zeros(1, dtype=torch.int32, device=tensors.parameters[0].device)
    numbers = (rule.rate, rule.beta1, rule.beta2, rule.epsilon, rule.t, DECOUPLED, correction, rule.decay)
    kernel(CHUNK, no_overflow, [list(kind) for kind in tensors], *numbers)


class DeepSpeedBuild:
    """DeepSpeed's kernel, which comes as source: it is there where it compiles."""

    def refusal(self, setting: str, value: str, device: torch.device) -> str | None:
        """The line that refuses it where it cannot be built; else it is, at its first use on a machine."""
        from deepspeed.accelerator import get_accelerator

        accelerator = get_accelerator().device_name()
        if device.type != accelerator:
            return (
                f"{setting} {value} computes on DeepSpeed's accelerator {accelerator} and this run is on "
                f"{device.type}: set {setting}=auto"
            )
        try:
            _deepspeeds_kernel()
        except Exception as error:  # a compiler's, ninja's, a loader's: whatever it is, it is told
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            return (
                f"{setting} {value} is compiled at its first use, and that failed ({reason}): install a C++ "
                f"compiler, Python's headers and ninja, or set {setting}=auto"
            )
        return None


# None: torch's own optimizer, fused.
ADAMW: dict[str, AdamUpdate | None] = {
    "torch": None,
    "apex": update_by_apex,
    "deepspeed": update_by_deepspeed,
}
ADAMW_PACKAGES: dict[str, Source] = {
    "apex": apex("optimizers", "amp_C", on_cpu=False),
    "deepspeed": DeepSpeedBuild(),
}
