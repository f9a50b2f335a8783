"""Where DeepSpeed's ZeRO wrappers keep gradients and master weights; read from version 0.19.8.

stage, precision         wrapper                   fp32 master weights
0, fp32                  the torch optimizer       the parameters themselves
1 and 2                  DeepSpeedZeroOptimizer    a flat partition a parameter group
1, bf16, fp32 gradients  BF16_Optimizer            a flat partition a parameter group
3                        ..._Stage3                a flat partition a sub-group
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class MasterSlice:
    """The elements [start, start + numel) of a flattened parameter, whose fp32 masters this rank steps.

    They lie at `offset` in `flat`, the tensor that the inner optimizer knows.
    """

    parameter: nn.Parameter
    start: int
    numel: int
    flat: torch.Tensor
    offset: int

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The slice's elements in `flat`, or in a moment of the same shape; a live view."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer within DeepSpeed's wrapper, if there is one."""
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def is_stage3(optimizer: Any) -> bool:
    """Whether parameters are partitioned."""
    return hasattr(optimizer, "parameter_offload")


def master_slices(optimizer: Any, parameters: Iterable[nn.Parameter], dp_rank: int) -> Iterator[MasterSlice]:
    """Where this rank's masters of each parameter lie; none where another rank has them all."""
    for parameter in parameters:
        if isinstance(optimizer, torch.optim.Optimizer):
            yield MasterSlice(parameter, 0, parameter.numel(), parameter, 0)
        elif is_stage3(optimizer):
            group, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
            flat = optimizer.fp32_partitioned_groups_flat[group]
            start = dp_rank * numel
            kept = max(0, min(numel, parameter.ds_numel - start))  # type: ignore[attr-defined]
            yield MasterSlice(parameter, start, kept, flat, offset)
        elif parameter._hp_mapping is not None:  # type: ignore[attr-defined]
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
            flat = _flat_partitions(optimizer)[mapping.param_group_index]
            yield MasterSlice(parameter, low.start, low.numel, flat, high.start)


def _flat_partitions(optimizer: Any) -> list[torch.Tensor]:
    if hasattr(optimizer, "fp32_groups_flat_partition"):  # BF16_Optimizer
        return optimizer.fp32_groups_flat_partition
    return optimizer.single_partition_of_fp32_groups


def _parameter_groups(optimizer: Any) -> list[list[nn.Parameter]]:
    names = ("fp16_groups", "bit16_groups", "bf16_groups")  # stage 3, stages 1 and 2, BF16_Optimizer
    return next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))


def adam_state(optimizer: Any, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """Adam's state of a flat tensor, made as Adam would make it where the first step is yet to come."""
    inner = inner_optimizer(optimizer)
    state = inner.state[flat]
    if not state:
        on_device = inner.defaults.get("fused") or inner.defaults.get("capturable")
        state["step"] = torch.zeros(
            (), dtype=torch.float32, device=flat.device if on_device else torch.device("cpu")
        )
        for moment in ADAM_MOMENTS:
            state[moment] = torch.zeros_like(flat, memory_format=torch.preserve_format)
    return state


def reduced_gradients(optimizer: Any, parameter: nn.Parameter) -> list[torch.Tensor]:
    """The gradients of a parameter that `step()` is about to use, summed over data parallel ranks.

    Where the wrapper keeps one list a group, these are the group's: give such a parameter a group alone.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        assert parameter.grad is not None
        return [parameter.grad]
    for index, group in enumerate(_parameter_groups(optimizer)):
        for place, member in enumerate(group):
            if member is parameter:
                if hasattr(optimizer, "fp32_groups_gradients"):  # BF16_Optimizer
                    return list(optimizer.fp32_groups_gradients[index])
                gradients = optimizer.averaged_gradients[index]
                return [gradients[place]] if is_stage3(optimizer) else list(gradients)
    raise ValueError("the optimizer does not hold this parameter")
