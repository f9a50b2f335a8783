"""Which groups each rank of a job has."""

from dataclasses import dataclass

from megalite.dryrun.log import Members

Order = tuple[Members, ...]


@dataclass
class Roster:
    """The groups of all ranks.

    Attributes:
        groups: by rank, the members of each of its groups by name.
        orders: by rank, the members of all groups that it made, in its order, those of others too.
        pp_ranks: the place of each rank in its pipeline.
    """

    groups: list[dict[str, Members]]
    orders: list[Order]
    pp_ranks: list[int]

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return len(self.groups)

    def of_stage(self, pp_rank: int) -> list[int]:
        """The ranks at a place of their pipelines."""
        return [rank for rank, place in enumerate(self.pp_ranks) if place == pp_rank]
