"""Where DeepSpeed's ZeRO wrappers keep weights, gradients and master weights; read from version 0.19.8.

stage, precision         wrapper                   fp32 master weights
0, fp32                  the torch optimizer       the parameters themselves
1 and 2                  DeepSpeedZeroOptimizer    a flat partition per parameter group
1, bf16, fp32 gradients  BF16_Optimizer            a flat partition per parameter group
3                        ..._Stage3                a flat partition per sub-group

A parameter that is not trained has no master: ZeRO-3 partitions it, the others leave it whole.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from megalite.optimizer.slices import MasterSlice
from megalite.training.unread import shape_alone


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer within DeepSpeed's wrapper, if there is one."""
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def is_stage3(optimizer: Any) -> bool:
    """Whether parameters are partitioned."""
    return hasattr(optimizer, "parameter_offload")


def is_bf16_optimizer(optimizer: Any) -> bool:
    """Whether gradients in bf16 are summed in fp32 below ZeRO-3: DeepSpeed's BF16_Optimizer."""
    return hasattr(optimizer, "fp32_groups_has_gradients")


def master_slices(
    optimizer: Any, parameters: Iterable[nn.Parameter], data_rank: int
) -> Iterator[MasterSlice]:
    """Where this rank's masters of each trained parameter lie; none where another rank has them all.

    data_rank: this rank among those that ZeRO partitions over.
    """
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if isinstance(optimizer, torch.optim.Optimizer):
            yield MasterSlice(parameter, 0, parameter.numel(), parameter, 0)
        elif is_stage3(optimizer):
            group, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
            flat = optimizer.fp32_partitioned_groups_flat[group]
            start = data_rank * numel
            kept = max(0, min(numel, parameter.ds_numel - start))  # type: ignore[attr-defined]
            yield MasterSlice(parameter, start, kept, flat, offset)
        elif parameter._hp_mapping is not None:  # type: ignore[attr-defined]
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
            flat = _flat_partitions(optimizer)[mapping.param_group_index]
            yield MasterSlice(parameter, low.start, low.numel, flat, high.start)


def local_weight(optimizer: Any, parameter: Any, data_rank: int) -> tuple[int, torch.Tensor]:
    """The weight that forward uses, as far as this rank holds it between steps: (start, flat live view)."""
    if not is_stage3(optimizer):
        return 0, parameter.detach().view(-1)
    start = data_rank * parameter.ds_tensor.ds_numel
    kept = max(0, min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start))
    return start, parameter.ds_tensor.detach().view(-1)[:kept]


def reduced_gradients(optimizer: Any, parameter: nn.Parameter) -> list[torch.Tensor]:
    """The gradients of a parameter that `step()` is about to use, summed over data-parallel ranks.

    Where the wrapper keeps one list per group, these are the whole group's: put such a parameter into a
    group of its own.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        assert parameter.grad is not None
        return [parameter.grad]
    for index, group in enumerate(_parameter_groups(optimizer)):
        for place, member in enumerate(group):
            if member is parameter:
                if is_bf16_optimizer(optimizer):
                    return list(optimizer.fp32_groups_gradients[index])
                gradients = optimizer.averaged_gradients[index]
                return [gradients[place]] if is_stage3(optimizer) else list(gradients)
    raise ValueError("the optimizer does not hold this parameter")


def square_of_gradients(optimizer: Any, is_counted: Callable[[nn.Parameter], bool]) -> torch.Tensor:
    """Sum of the squares of the gradients that this rank is about to step under ZeRO-3; a scalar, fp32."""
    total = torch.zeros((), dtype=torch.float32, device=optimizer.device)
    for index, group in enumerate(optimizer.fp16_groups):
        for gradient, parameter in zip(optimizer.averaged_gradients[index], group, strict=True):
            if is_counted(parameter):
                total += gradient.float().square().sum()
    return total


def clear_gradients(optimizer: Any) -> None:
    """Let ZeRO-3 add gradients from a step's first backward on.

    It copies them in the first backward of a step and adds in later ones: a parameter that the first does not
    reach, of another chunk or an expert without tokens, would be added to the gradient of the step before.
    """
    for partition in optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.values():
        partition.zero_()
    optimizer.micro_step_id = 1


_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def loss_scale_state(optimizer: Any) -> dict[str, float]:
    """Where fp16's search for a loss scale stands, the same on every rank; empty where none is searched."""
    scaler = getattr(optimizer, "loss_scaler", None)
    return {name: getattr(scaler, name) for name in _SCALER_FIELDS} if _searches(scaler) else {}


def set_loss_scale(optimizer: Any, state: Mapping[str, float]) -> None:
    """Let the search stand where `loss_scale_state` was taken; that of another precision says nothing."""
    scaler = getattr(optimizer, "loss_scaler", None)
    if _searches(scaler):
        for name, value in state.items():
            setattr(scaler, name, value)


def _searches(scaler: Any) -> bool:
    return getattr(scaler, "dynamic", False)


@contextmanager
def with_shapes(optimizer: Any, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let parameters take a gradient though ZeRO-3 has not gathered them: its shape is what counts."""
    partitioned: Any = parameters if is_stage3(optimizer) else []
    released = [(p, p.data) for p in partitioned if p.shape != p.ds_shape]
    for parameter, _ in released:
        parameter.data = shape_alone(parameter)
    try:
        yield
    finally:
        for parameter, nothing in released:
            parameter.data = nothing


def _flat_partitions(optimizer: Any) -> list[torch.Tensor]:
    if is_bf16_optimizer(optimizer):
        return optimizer.fp32_groups_flat_partition
    return optimizer.single_partition_of_fp32_groups


def _parameter_groups(optimizer: Any) -> list[list[nn.Parameter]]:
    names = ("fp16_groups", "bit16_groups", "bf16_groups")  # stage 3, stages 1 and 2, BF16_Optimizer
    return next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))
