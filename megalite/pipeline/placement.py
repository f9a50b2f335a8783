"""Which rank of a pipeline holds which stages (pure arithmetic)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """How num_ranks * num_chunks stages lie on the ranks.

    Round after round, or with `is_v` there and back again, so that first and last stage are on rank 0:

        num_ranks 2, num_chunks 2      rank 0         rank 1
        round after round              stage 0, 2     stage 1, 3
        V                              stage 0, 3     stage 1, 2
    """

    num_ranks: int
    num_chunks: int = 1
    is_v: bool = False

    @property
    def num_stages(self) -> int:
        """Stages of the whole pipeline."""
        return self.num_ranks * self.num_chunks

    def stage(self, rank: int, chunk: int) -> int:
        """The stage that is a rank's chunk."""
        return chunk * self.num_ranks + self._turned(rank, chunk)

    def holder(self, stage: int) -> tuple[int, int]:
        """The rank and chunk that a stage is."""
        chunk, place = divmod(stage, self.num_ranks)
        return self._turned(place, chunk), chunk

    def _turned(self, place: int, chunk: int) -> int:
        return self.num_ranks - 1 - place if self.is_v and chunk % 2 else place
