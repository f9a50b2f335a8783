"""What lies in an engine, in bytes by name: the measured side of plan/memory.py."""

from collections.abc import Iterable
from typing import Any

import torch

from megalite.training.engine import StageEngine
from megalite.training.zero import inner_optimizer, is_stage3


def state_of_engine(engine: StageEngine) -> dict[str, int]:
    """Bytes of weights, master copy, gradients and moments, each number in memory once; after a step.

    A gradient that a step makes and lets go of again is not there then: at ZeRO 0 to 2 it counts as 0.
    """
    optimizer = engine.optimizer
    moments = [t for state in inner_optimizer(optimizer).state.values() for t in state.values()]
    kept = {
        "weights": _weights(engine),
        "master copy": [part.flat for part in engine.masters()],
        "gradients": _gradients(engine),
        "moments": [t for t in moments if isinstance(t, torch.Tensor) and t.numel() > 1],
    }
    seen: set[int] = set()
    return {name: _bytes_of(tensors, seen) for name, tensors in kept.items()}


def _weights(engine: StageEngine) -> list[Any]:
    parameters = engine.module.parameters()
    return [p.ds_tensor if is_stage3(engine.optimizer) else p for p in parameters]  # type: ignore[attr-defined]


def _gradients(engine: StageEngine) -> list[torch.Tensor]:
    if is_stage3(engine.optimizer):
        return [engine.optimizer.grad_partitions_flat_buffer]
    if hasattr(engine.optimizer, "fp32_groups_gradients_flat"):  # BF16_Optimizer
        return list(engine.optimizer.fp32_groups_gradients_flat)
    return [p.grad for p in engine.module.parameters() if p.grad is not None]


def _bytes_of(tensors: Iterable[torch.Tensor], seen: set[int]) -> int:
    """Of the storages that are not among those seen."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
