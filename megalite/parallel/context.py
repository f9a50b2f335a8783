"""The process groups of one rank, built once and passed on: nothing looks them up."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megalite.parallel.topology import Coordinates, Topology

Group = dist.ProcessGroup | None  # None is a group of one: no process group is needed for it


@dataclass(frozen=True)
class ParallelContext:
    """Where this rank stands, and with whom it talks.

    Attributes:
        topology: the grid of all ranks.
        rank: this process in the world.
        device: where its tensors live.
        tp_group: holders of the slices of the same layers.
        dp_group: holders of the same slices, with other data.
        pp_group: the stages of one pipeline, first to last.
        model_parallel_group: tp x pp, one whole model.
        tied_group: first and last stage (None on stages between, or with one stage).
        replica_group: holders of the same KV head (None unless tp_size exceeds the KV heads).
    """

    topology: Topology
    rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tp_group: Group = None
    dp_group: Group = None
    pp_group: Group = None
    model_parallel_group: Group = None
    tied_group: Group = None
    replica_group: Group = None

    @classmethod
    def build(
        cls, topology: Topology, rank: int, device: torch.device, *, kv_replicas: int = 1
    ) -> "ParallelContext":
        """Create every group; collective, called by all ranks in the same order.

        kv_replicas: neighbouring tensor-parallel ranks that hold the same KV head.
        """

        def mine(lists: list[list[int]]) -> Group:
            own = None
            for ranks in lists:
                group = dist.new_group(ranks)
                own = group if rank in ranks else own
            return own

        return cls(
            topology=topology,
            rank=rank,
            device=device,
            tp_group=mine(topology.tp_groups()),
            dp_group=mine(topology.dp_groups()),
            pp_group=mine(topology.pp_groups()),
            model_parallel_group=mine(topology.model_parallel_groups()),
            tied_group=mine(topology.tied_groups()) if topology.pp_size > 1 else None,
            replica_group=mine(topology.replica_groups(kv_replicas)) if kv_replicas > 1 else None,
        )

    @property
    def coordinates(self) -> Coordinates:
        """This rank's place along each axis."""
        return self.topology.coordinates(self.rank)

    @property
    def tp_size(self) -> int:
        return self.topology.tp_size

    @property
    def pp_size(self) -> int:
        return self.topology.pp_size

    @property
    def dp_size(self) -> int:
        return self.topology.dp_size

    @property
    def tp_rank(self) -> int:
        return self.coordinates.tp_rank

    @property
    def pp_rank(self) -> int:
        return self.coordinates.pp_rank

    @property
    def dp_rank(self) -> int:
        return self.coordinates.dp_rank

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1


def group_size(group: Group) -> int:
    """Members of a group; None counts as a group of one."""
    return 1 if group is None else group.size()


def group_rank(group: Group) -> int:
    """This process within a group; None counts as a group of one."""
    return 0 if group is None else group.rank()
