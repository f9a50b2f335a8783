"""Sums of gradients that begin with the first of them, where BF16_Optimizer begins with zeros, written twice.

Read from DeepSpeed 0.19.8. In bf16 with fp32 gradients that is a fiftieth of a step of two micro batches.
"""

from typing import Any

import torch

from megalite.training.zero import is_bf16_optimizer


def begin_with_the_first(optimizer: Any) -> None:
    """Let a BF16_Optimizer copy the first gradient of a step, and add later ones; others stay as they are."""
    if not is_bf16_optimizer(optimizer):
        return
    add = optimizer._update_hp_grad

    def copy_or_add(lp: Any, group: int, index: int, clear_lp_grads: bool) -> None:
        if lp.grad is None or optimizer.fp32_groups_has_gradients[group][index]:
            return add(lp, group, index, clear_lp_grads)
        total = optimizer.fp32_groups_gradients[group][index]
        total.data.copy_(lp.grad.data.view(total.shape))
        lp._hp_grad = total
        optimizer.fp32_groups_has_gradients[group][index] = True
        if clear_lp_grads:
            lp.grad.zero_()

    def forget() -> None:
        optimizer.fp32_groups_has_gradients = [[False] * len(g) for g in optimizer.fp32_groups_gradients]

    optimizer._update_hp_grad, optimizer.clear_hp_grads = copy_or_add, forget


@torch.no_grad()
def clear_unreached(optimizer: Any) -> None:
    """Zero the sums of parameters that no backward of a step reached on this rank; before they are reduced.

    Another rank may have reached them: to it these are as others.
    """
    if is_bf16_optimizer(optimizer):
        groups = zip(optimizer.fp32_groups_gradients, optimizer.fp32_groups_has_gradients, strict=True)
        for totals, reached in groups:
            for index, total in enumerate(totals):
                if not reached[index]:
                    total.zero_()
                    reached[index] = True
