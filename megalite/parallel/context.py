"""The process groups of one rank, built once and passed on: nothing looks them up."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megalite.parallel.node_memory import share_memory
from megalite.parallel.topology import DATA_AXES, MODEL_AXES, STAGE_AXES, Topology

Group = dist.ProcessGroup | None  # None is a group of one: no process group is needed for it

# What is communicated over: single axes, and axes together.
GROUPS = [
    *(("tp",), ("kv_copy",), ("pp",)),
    ("cp",),  # other parts of the same samples
    ("dp",),  # other samples: they divide the global batch
    DATA_AXES,  # the same weights: ZeRO partitions over them, and averages gradients
    MODEL_AXES,  # one whole model: the gradient norm spans them
    STAGE_AXES,  # one stage: its matrices are made whole over them
    ("ep",),  # other experts: tokens go to them
    ("edp",),  # the same experts with other tokens: ZeRO partitions these over them
]

# Over these, tensors go by way of mappings.py, which finds the memory that ranks share.
MAPPED = [("tp",), ("kv_copy",), ("cp",), DATA_AXES, ("edp",)]


@dataclass(frozen=True)
class Ranks:
    """The ranks along one or several axes, as one of them sees them.

    Attributes:
        axes: their names, slowest first.
        group: the process group, None where it is of one rank and no group was made.
        size: number of ranks.
        rank: this one among them.
    """

    axes: tuple[str, ...]
    group: Group = None
    size: int = 1
    rank: int = 0


class ParallelContext:
    """Where this rank stands, and with whom it talks.

        context["tp"].size        context["dp", "cp"].group

    Without process groups it is a job of one rank.

    Args:
        topology: the grid of all ranks.
        rank: this process in the world.
        device: where its tensors live.
        groups: process groups by the axes that they run along.
        tied_group: first and last stage of this rank's pipeline, where there are two.
    """

    def __init__(
        self,
        topology: Topology | None = None,
        rank: int = 0,
        device: torch.device | None = None,
        groups: dict[tuple[str, ...], Group] | None = None,
        tied_group: Group = None,
    ) -> None:
        self.topology = topology or Topology(1)
        self.rank = rank
        self.device = device or torch.device("cpu")
        self.tied_group = tied_group
        self._groups = groups or {}
        self._ranks: dict[tuple[str, ...], Ranks] = {}  # what was asked for: layers ask in every forward

    @classmethod
    def build(
        cls,
        topology: Topology,
        rank: int,
        device: torch.device,
        new_group: Callable[[list[int]], Group] = dist.new_group,
    ) -> "ParallelContext":
        """Create every group; collective, called by all ranks in the same order.

        new_group: makes one of its ranks.
        """
        made: dict[tuple[int, ...], Group] = {}

        def mine(lists: list[list[int]]) -> Group:
            for ranks in lists:
                if tuple(ranks) not in made:
                    made[tuple(ranks)] = new_group(ranks)
            return next((made[tuple(ranks)] for ranks in lists if rank in ranks), None)

        groups = {axes: mine(topology.groups(*axes)) for axes in GROUPS if _is_needed(topology, axes)}
        has_ends = topology["pp"].size > 1
        ends = [[stages[0], stages[-1]] for stages in topology.groups("pp")] if has_ends else []
        return cls(topology, rank, device, groups, mine(ends))

    def share_memory(self) -> "ParallelContext":
        """Have groups on the CPUs of one node talk through memory; collective. This context."""
        if self.device.type == "cpu":
            share_memory(self._groups.get(axes) for axes in MAPPED)
        return self

    def __getitem__(self, axes: str | tuple[str, ...]) -> Ranks:
        """The ranks along an axis, or along several together."""
        names = (axes,) if isinstance(axes, str) else axes
        if names not in self._ranks:
            members = self.topology.members(self.rank, *names)
            place = members.index(self.rank)
            self._ranks[names] = Ranks(names, self._groups.get(names), len(members), place)
        return self._ranks[names]


def _is_needed(topology: Topology, axes: tuple[str, ...]) -> bool:
    """One rank needs no group of its own, except where DeepSpeed would take None for the world."""
    if axes == ("edp",):
        return topology["ep"].size > 1  # else they are the data axes
    return axes in (DATA_AXES, MODEL_AXES) or any(topology[axis].size > 1 for axis in axes)


def group_size(group: Group) -> int:
    """Members of a group; None counts as a group of one."""
    return 1 if group is None else group.size()
