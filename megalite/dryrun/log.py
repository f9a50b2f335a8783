"""What one rank says to others in a step, in its order, as plain values.

Groups are named by the axes that they run along, so that the log of one rank is that of all that do the same
elsewhere: each looks its own members up.
"""

from dataclasses import dataclass
from typing import Literal

WORLD = "world"
TIED = "first and last stage"
Verb = Literal["send", "receive"]
Members = tuple[int, ...]  # of a group


@dataclass(frozen=True, slots=True)
class Call:
    """A collective that a rank enters.

    Attributes:
        group: its name.
        kind: "all_reduce", "all_gather", "reduce_scatter" or "all_to_all".
        num_bytes: of the whole tensor: what each rank has after an all-gather, before a reduce-scatter.
        place: what the rank is doing, in words.
        is_modelled: written down from what DeepSpeed is known to do, not met in a walk.
    """

    group: str
    kind: str
    num_bytes: int
    place: str
    is_modelled: bool = False

    @property
    def sign(self) -> tuple[str, int]:
        """What must be equal on all members."""
        return self.kind, self.num_bytes

    def __str__(self) -> str:
        return f"{self.kind} of {self.num_bytes:,} bytes ({self.place})"


@dataclass(frozen=True, slots=True)
class Passage:
    """A tensor that a rank sends or receives.

    Attributes:
        group: its name.
        offset: of the peer's place in the group from this rank's, modulo its size.
        tensor: what travels, in words; both ends must say the same.
    """

    verb: Verb
    group: str
    offset: int
    num_bytes: int
    tensor: str

    @property
    def sign(self) -> tuple[str, int]:
        """What must be equal at both ends."""
        return self.tensor, self.num_bytes


@dataclass(frozen=True, slots=True)
class Exchange:
    """Tensors that a rank sends and receives at once: it goes on when all have met their other ends."""

    passages: tuple[Passage, ...]
    place: str


Entry = Call | Exchange
Log = tuple[Entry, ...]
