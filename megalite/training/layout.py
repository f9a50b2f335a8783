"""How a run lies on its ranks: its process groups, without the engine that trains on them."""

import torch

from megalite.config.run import RunConfig
from megalite.model.attention import kv_copies
from megalite.parallel.context import ParallelContext
from megalite.parallel.topology import Topology


def build_context(run: RunConfig, rank: int, world_size: int, device: torch.device) -> ParallelContext:
    """The process groups of a run; collective."""
    context = ParallelContext.build(topology_of(run, world_size), rank, device)
    return context.share_memory() if run.parallel.share_node_memory else context


def topology_of(run: RunConfig, world_size: int) -> Topology:
    """The grid of a run's ranks."""
    tp_size, pp_size = run.parallel.tp_size, run.parallel.pp_size
    copies = kv_copies(run.model.num_key_value_heads, tp_size)
    sizes = {"tp_size": tp_size, "pp_size": pp_size, "cp_size": run.parallel.cp_size}
    return Topology(world_size, **sizes, ep_size=run.parallel.ep_size, kv_copy_size=copies)
