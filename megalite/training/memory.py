"""What lies in an engine, in bytes by name, the measured side of plan/memory.py; where freed blocks go."""

from collections.abc import Iterable
from typing import Any

import torch

from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.run import RunConfig
from megalite.measure.allocator import mapped_block_mib, settle_blocks
from megalite.measure.memory import node_bytes
from megalite.parallel.context import ParallelContext
from megalite.plan.memory import SHARED, plan_memory
from megalite.training.engine import StageEngine
from megalite.training.zero import inner_optimizer, is_bf16_optimizer, is_stage3


def settle_memory(
    run: RunConfig, deepspeed: DeepSpeedConfig, context: ParallelContext, local_world_size: int
) -> bool:
    """On a CPU, before a trainer is made: whether freed blocks are kept by this process or go back.

    local_world_size: ranks on this node.
    """
    if context.device.type != "cpu":
        return False
    plan = plan_memory(run, deepspeed, context.topology.world_size, context.rank)
    planned = sum(number for name, number in plan.items() if name != SHARED)  # which no allocator gives out
    mib = mapped_block_mib(run.memory.mapped_block_mib, planned * local_world_size, node_bytes())
    return settle_blocks(mib) and mib == 0


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
    if is_bf16_optimizer(engine.optimizer):
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
