"""Where a rank is in its work: its main thread marks it, and its watch reads it."""

from typing import NamedTuple


class Mark(NamedTuple):
    """A place that a rank has reached.

    number: of marks made before it. All ranks make the same ones in the same order: the lower is behind.
    step: 1-based; None outside of steps.
    """

    number: int
    place: str
    step: int | None = None

    def __str__(self) -> str:
        return self.place if self.step is None else f"step {self.step}, {self.place}"


class Marks:
    """The latest mark of this process. Its main thread alone calls it; any thread may read `last`."""

    def __init__(self, place: str) -> None:
        self.last = Mark(0, place)

    def __call__(self, place: str, step: int | None = None) -> None:
        """Say that `place` is reached; on all ranks alike. One assignment: there is nothing to lock."""
        self.last = Mark(self.last.number + 1, place, step)
