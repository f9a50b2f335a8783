"""Which rank sits where: pure arithmetic, tested without a process.

Ranks run tensor-parallel fastest, then data-parallel, then pipeline:

    rank = (pp_rank * dp_size + dp_rank) * tp_size + tp_rank

so that tensor-parallel neighbours, which talk most, share a node.
"""

from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Coordinates:
    """A rank's place along each axis."""

    pp_rank: int
    dp_rank: int
    tp_rank: int


@dataclass(frozen=True)
class Topology:
    """The grid [pp_size, dp_size, tp_size] of all ranks of a job.

    Raises ValueError when tp_size x pp_size does not divide world_size.
    """

    world_size: int
    tp_size: int = 1
    pp_size: int = 1

    def __post_init__(self) -> None:
        model_ranks = self.tp_size * self.pp_size
        if self.world_size % model_ranks:
            raise ValueError(
                f"{self.world_size} processes cannot be divided into tp_size {self.tp_size} x pp_size "
                f"{self.pp_size} = {model_ranks}: start a multiple of {model_ranks} processes"
            )

    @property
    def dp_size(self) -> int:
        """Data-parallel replicas: what remains of the world."""
        return self.world_size // (self.tp_size * self.pp_size)

    def rank_at(self, pp_rank: int, dp_rank: int, tp_rank: int) -> int:
        """The rank at a place of the grid."""
        return (pp_rank * self.dp_size + dp_rank) * self.tp_size + tp_rank

    def coordinates(self, rank: int) -> Coordinates:
        """The place of a rank in the grid."""
        outer, tp_rank = divmod(rank, self.tp_size)
        pp_rank, dp_rank = divmod(outer, self.dp_size)
        return Coordinates(pp_rank, dp_rank, tp_rank)

    def tp_groups(self) -> list[list[int]]:
        """Ranks that hold the slices of the same layers: same stage, same replica."""
        return self._groups("pd", "t")

    def dp_groups(self) -> list[list[int]]:
        """Ranks that hold the same slices and see other data: same stage, same tp_rank."""
        return self._groups("pt", "d")

    def pp_groups(self) -> list[list[int]]:
        """Ranks that hand activations to each other: same replica, same tp_rank."""
        return self._groups("dt", "p")

    def model_parallel_groups(self) -> list[list[int]]:
        """Ranks that together hold one whole model (tp x pp), in the order pp_rank * tp_size + tp_rank."""
        return self._groups("d", "pt")

    def tied_groups(self) -> list[list[int]]:
        """First and last stage of each pipeline: the owners of a tied embedding."""
        return [[ranks[0], ranks[-1]] for ranks in self.pp_groups()]

    def replica_groups(self, replicas: int) -> list[list[int]]:
        """Runs of `replicas` neighbours in each tensor-parallel group: holders of the same KV head."""
        return [
            ranks[i : i + replicas] for ranks in self.tp_groups() for i in range(0, self.tp_size, replicas)
        ]

    def _groups(self, fixed: str, varying: str) -> list[list[int]]:
        sizes = {"p": self.pp_size, "d": self.dp_size, "t": self.tp_size}

        def places(axes: str) -> list[dict[str, int]]:
            return [
                dict(zip(axes, index, strict=True)) for index in product(*(range(sizes[a]) for a in axes))
            ]

        def rank(place: dict[str, int]) -> int:
            return self.rank_at(place["p"], place["d"], place["t"])

        return [[rank(outer | inner) for inner in places(varying)] for outer in places(fixed)]
