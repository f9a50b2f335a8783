"""Which rank sits where: pure arithmetic, tested without a process.

The grid of all ranks is an ordered table of named axes, slowest first:

    rank = ((pp_rank * dp_size + dp_rank) * cp_size + cp_rank) * tp_size + tp_rank

so that tensor-parallel neighbours, which talk most, share a node. A cut is an axis within others: it divides
the ranks of neighbouring axes into runs of neighbours. Every group, rank and size follows from the tables.
"""

from math import prod
from typing import NamedTuple

# name of the axis, slowest first -> what differs along it
AXES = {
    "pp": "stages of one pipeline, with other layers",
    "dp": "other samples",
    "cp": "other parts of the same samples",
    "tp": "slices of the same layers",
}


class Cut(NamedTuple):
    """An axis of runs of neighbours within others, and the axis of what is left: which run it is."""

    within: tuple[str, ...]
    rest: str


REMAINING = "dp"  # takes what remains of the world

# name of the cut -> the axes that it divides
CUTS = {
    "ep": Cut(("dp", "cp"), rest="edp"),  # experts: others over ep; the same, with other tokens, over edp
    "kv_copy": Cut(("tp",), rest="kv"),  # key/value heads: the same one over kv_copy, others over kv
}
DATA_AXES = ("dp", "cp")  # over which the same weights see other tokens
MODEL_AXES = ("pp", "tp")  # over which one model lies
STAGE_AXES = (*DATA_AXES, "tp")  # over which one stage lies, with its copies


class Extent(NamedTuple):
    """How an axis lies in the grid: the place of a rank on it is rank // stride % size."""

    size: int
    stride: int


class Topology:
    """The grid of all ranks of a job.

        Topology(16, tp_size=2, pp_size=2)  # dp_size is what remains: 4

    Each axis and each cut takes its size as NAME_size; 1 if it is not given. Raises ValueError where sizes do
    not divide.
    """

    def __init__(self, world_size: int, **sizes: int) -> None:
        given = {name.removesuffix("_size"): size for name, size in sizes.items()}
        unknown = given.keys() - (AXES.keys() - {REMAINING}) - CUTS.keys()
        if unknown:
            raise TypeError(f"{unknown.pop()}_size: no such axis; known are {', '.join([*AXES, *CUTS])}")
        self.world_size = world_size
        self._extents: dict[str, Extent] = {}
        self._groups: dict[tuple[str, ...], list[list[int]]] = {}  # what was asked for
        self._lay_axes({axis: given.get(axis, 1) for axis in AXES})
        for name, cut in CUTS.items():
            self._lay_cut(name, cut, given.get(name, 1))

    def _lay_axes(self, sizes: dict[str, int]) -> None:
        model_ranks = prod(sizes.values())
        if self.world_size % model_ranks:
            named = " x ".join(f"{axis}_size {sizes[axis]}" for axis in reversed(AXES) if sizes[axis] > 1)
            raise ValueError(
                f"{self.world_size} processes cannot be divided into {named} = {model_ranks}: start a "
                f"multiple of {model_ranks} processes"
            )
        stride = 1
        for axis in reversed(AXES):
            size = self.world_size // model_ranks if axis == REMAINING else sizes[axis]
            self._extents[axis] = Extent(size, stride)
            stride *= size

    def _lay_cut(self, name: str, cut: Cut, size: int) -> None:
        ranks, stride = prod(self[axis].size for axis in cut.within), self[cut.within[-1]].stride
        if ranks % size:
            raise ValueError(
                f"{ranks} ranks of {' x '.join(cut.within)} cannot be cut into runs of {name}_size {size}: "
                f"choose a divisor of {ranks}"
            )
        self._extents[name] = Extent(size, stride)
        self._extents[cut.rest] = Extent(ranks // size, stride * size)

    def __getitem__(self, axis: str) -> Extent:
        """Size and stride of an axis or a cut."""
        return self._extents[axis]

    def place(self, rank: int, axis: str) -> int:
        """Where a rank is along an axis."""
        size, stride = self[axis]
        return rank // stride % size

    def members(self, rank: int, *axes: str) -> list[int]:
        """The ranks that differ from `rank` along these axes alone, the first axis slowest."""
        members = [rank - sum(self.place(rank, axis) * self[axis].stride for axis in axes)]
        for axis in axes:
            size, stride = self[axis]
            members = [member + place * stride for member in members for place in range(size)]
        return members

    def groups(self, *axes: str) -> list[list[int]]:
        """All groups along these axes, ordered by their first ranks; each rank is in one of them."""
        if axes not in self._groups:
            firsts = dict.fromkeys(self.members(rank, *axes)[0] for rank in range(self.world_size))
            self._groups[axes] = [self.members(first, *axes) for first in firsts]
        return self._groups[axes]
