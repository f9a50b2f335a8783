"""What a rank of a pipeline does, as plain values; a schedule is a list of them per rank.

A model's layers are cut into stages, numbered along the way of a micro batch. Each rank of the pipeline holds
one stage, or several, its chunks.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megalite.error import UserError

Verb = Literal["send", "receive"]
Kind = Literal["activation", "gradient"]


@dataclass(frozen=True)
class Forward:
    """Run the layers of one of this rank's chunks on one micro batch."""

    micro_batch: int
    chunk: int = 0


@dataclass(frozen=True)
class Backward:
    """Back-propagate one micro batch through a chunk; is_last: no backward of the step follows it here."""

    micro_batch: int
    chunk: int = 0
    is_last: bool = False


@dataclass(frozen=True)
class BackwardInput:
    """The part of a backward that the stage before waits for; what is left of it is a BackwardWeight."""

    micro_batch: int
    chunk: int = 0
    is_last: bool = False


@dataclass(frozen=True)
class BackwardWeight:
    """The weights' gradients that the BackwardInput of this micro batch and chunk left."""

    micro_batch: int
    chunk: int = 0
    is_last: bool = False


@dataclass(frozen=True)
class Transfer:
    """One tensor that goes to, or comes from, another rank: posted here, waited for where it is used.

    Attributes:
        verb: "send" or "receive".
        kind: what travels: the "activation" that a forward made, or the "gradient" that a backward made.
        micro_batch: whose it is.
        peer: the other rank, by its pp_rank.
        chunk: which of this rank's chunks made it, or is to use it.
    """

    verb: Verb
    kind: Kind
    micro_batch: int
    peer: int
    chunk: int = 0


@dataclass(frozen=True)
class Handover:
    """One tensor that goes from a chunk to another one of the same rank."""

    kind: Kind
    micro_batch: int
    source: int
    target: int


AnyBackward = Backward | BackwardInput | BackwardWeight
Compute = Forward | AnyBackward
Action = Compute | Transfer | Handover

# Each kind of computation, as people read it.
WORDS: dict[type[Compute], str] = {
    Forward: "forward",
    Backward: "backward",
    BackwardInput: "input gradient",
    BackwardWeight: "weight gradient",
}


class ScheduleError(UserError):
    """A schedule that does not exist, or of nothing."""


def detail_of(action: Action) -> dict[str, Any]:
    """An action in plain values, as recorded timelines keep it."""
    return {"action": type(action).__name__, **asdict(action)}


def computation_of(detail: Mapping[str, Any]) -> Compute | None:
    """The inverse for computations, but for `is_last`; None for plain values of something else."""
    kind = {kind.__name__: kind for kind in WORDS}.get(detail.get("action", ""))
    return kind(detail["micro_batch"], detail["chunk"]) if kind else None
