"""One copy where DeepSpeed's ZeRO keeps two: fp32 masters of fp32 weights, and gradients about to be stepped.

Read from version 0.19.8, as training/zero.py is, which tells where all of these lie.
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch

from megalite.training.zero import is_bf16_optimizer, is_stage3


def share_masters(optimizer: Any) -> None:
    """Let the fp32 masters of fp32 weights be these weights; call it before anything looks at masters.

    ZeRO-1 and 2 copy the partition that a rank steps out of the flat weights. ZeRO-3 means to share it, and
    compares a device with a string. A step then writes its result where forward reads it, and the copy from
    master to weight that follows finds both in one place. Half-precision weights have masters of their own.
    """
    for master, weights in _pairs(optimizer):
        if weights.dtype == master.dtype:
            assert torch.equal(master.detach(), weights), (
                "masters are not what the weights are: this is a bug"
            )
            master.data = weights
    if not isinstance(optimizer, torch.optim.Optimizer) and not is_stage3(optimizer):
        _point_fragments_at_masters(optimizer)


def _pairs(optimizer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each flat master partition, with the weights that it was made from, [numel] both."""
    if isinstance(optimizer, torch.optim.Optimizer) or is_bf16_optimizer(optimizer):
        return  # ZeRO-0 has no masters, and BF16_Optimizer none of its weights' format
    if is_stage3(optimizer):
        yield from zip(
            optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, strict=True
        )
        return
    masters, groups = optimizer.single_partition_of_fp32_groups, optimizer.parallel_partitioned_bit16_groups
    for master, partitions, data_group in zip(masters, groups, optimizer.real_dp_process_group, strict=True):
        yield master, partitions[torch.distributed.get_rank(data_group)]


def _point_fragments_at_masters(optimizer: Any) -> None:
    """DeepSpeed's own table of where parameters' masters lie: its views would keep the first copy alive."""
    if not hasattr(optimizer, "single_partition_of_fp32_groups"):
        return
    for group, master in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None:
                at = mapping.hp_fragment_address
                mapping.hp_fragment = master.detach().narrow(0, at.start, at.numel)


def update_from_partitions(optimizer: Any) -> None:
    """Let ZeRO-3 step from the partitions in which it summed gradients, not from a second copy of them.

    They lie in one tensor in the order of its sub-groups. Clipping scales them in place; the next step begins
    with zeros. Gradients that are summed in half precision are copied, as masters want fp32.
    """
    flat = optimizer.grad_partitions_flat_buffer
    sizes = [master.numel() for master in optimizer.fp32_partitioned_groups_flat]
    starts = [0, *accumulate(sizes)]
    assert starts[-1] == flat.numel(), "gradient partitions are not as many as masters: this is a bug"

    def prepare(sub_group: int) -> None:
        master = optimizer.fp32_partitioned_groups_flat[sub_group]
        of_group = flat.narrow(0, starts[sub_group], sizes[sub_group])
        first = optimizer.averaged_gradients[sub_group][0]
        assert first.data_ptr() == of_group.data_ptr(), "gradients are not in their partitions: this is a bug"
        master.grad = of_group.to(master.dtype)
        optimizer.averaged_gradients[sub_group] = None

    optimizer._prepare_fp32_grad_for_sub_group = prepare
