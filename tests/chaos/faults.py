"""What may happen to a run: drawn from a seed, and done by a rank to itself or from outside."""

import errno
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass

from tests.chaos.operations import Operation

# operations of one save, roughly, of rank 0 and of every other rank: how far ahead a fault is drawn
PER_SAVE = (
    {"open": 6, "write": 60, "fsync": 8, "rename": 2, "mkdir": 2, "unlink": 5, "rmdir": 1},
    {"open": 1, "write": 60, "fsync": 1},
)
SAVES_AHEAD = 2.5
MOMENT_SECONDS = 3.0  # of a tiny run's life, most of it its start
DEATHS = {"kill one": 4, "kill all": 4, "power cut": 4, "stop": 1}  # at an operation of a save
MOMENTS = {"kill one at a moment": 1, "kill all at a moment": 1, "stop at a moment": 1, "signal": 1}
ERRORS = {"full disk": 2, "failing fsync": 1.5, "failing rename": 1.5}
DAMAGE = {"truncated": 1, "zeros": 1, "flipped": 1, "empty": 0.5, "missing": 0.5}  # between two lives
WEIGHTS = DEATHS | MOMENTS | ERRORS | {f"file {kind}": weight for kind, weight in DAMAGE.items()}
ERROR_NUMBERS = {"full disk": errno.ENOSPC, "failing fsync": errno.EIO, "failing rename": errno.EIO}
ERROR_OPERATIONS = {
    "full disk": ("write", "open", "mkdir"),
    "failing fsync": ("fsync",),
    "failing rename": ("rename",),
}


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong; what its kind has no use for is drawn and left alone.

    operation, number: it comes at the so-manieth operation of this kind in the checkpoints of the life.
    half: of a write that it meets, the first half is made.
    length: so many operations fail, from the first on.
    seconds: after the start of a life; patience_seconds: for which ranks live on beside a dead one.
    place: of the damage in a file, and which file: from 0 to 1.
    """

    kind: str
    rank: int
    operation: str
    number: int
    half: bool
    length: int
    seconds: float
    patience_seconds: float
    place: float
    which: float
    signal: int

    @classmethod
    def draw(cls, dice: random.Random, world_size: int) -> "Fault":
        kind = dice.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        rank = dice.randrange(world_size)
        counts = PER_SAVE[min(rank, 1)]
        candidates = [name for name in ERROR_OPERATIONS.get(kind, tuple(counts)) if name in counts]
        if not candidates:  # only rank 0 renames
            rank, counts, candidates = 0, PER_SAVE[0], list(ERROR_OPERATIONS[kind])
        operation = dice.choice(candidates)
        return cls(
            kind=kind,
            rank=rank,
            operation=operation,
            number=1 + int(dice.random() * SAVES_AHEAD * counts[operation]),
            half=dice.random() < 0.5,
            length=dice.choice((1, 3, 10**6)),
            seconds=MOMENT_SECONDS * dice.random(),
            patience_seconds=dice.choice((0.0, 0.1, 1.0)),
            place=dice.random(),
            which=dice.random(),
            signal=dice.choice((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)),
        )

    @property
    def damage(self) -> str | None:
        """Of a file between two lives, as `power.spoil` names it."""
        return self.kind.removeprefix("file ") if self.kind.startswith("file ") else None

    @property
    def is_death(self) -> bool:
        """Whether the life ends without order."""
        return self.kind in DEATHS or (self.kind in MOMENTS and self.kind != "signal")

    @property
    def ends_all(self) -> bool:
        """Whether all ranks end at the very moment."""
        return self.kind in ("kill all", "power cut", "kill all at a moment")

    def in_words(self) -> str:
        """For the table."""
        if self.damage:
            return f"file {self.which:.2f} at {self.place:.2f}"
        if self.kind in MOMENTS:
            return f"rank {self.rank} after {self.seconds:.2f} s"
        more = f", {self.length} in all" if self.kind in ERRORS else ", half done" if self.half else ""
        return f"rank {self.rank}, {self.operation} {self.number}{more}"


class Trap:
    """A fault that waits for its operation on its rank. met: what is to be told when it comes."""

    def __init__(self, fault: Fault, met: Callable[[], object]) -> None:
        self._fault, self._met, self._count = fault, met, 0

    def __call__(self, operation: Operation) -> None:
        """Before an operation on the checkpoints."""
        fault = self._fault
        if fault.kind not in DEATHS | ERRORS or operation.kind != fault.operation:
            return
        self._count += 1
        if not fault.number <= self._count < fault.number + (fault.length if fault.kind in ERRORS else 1):
            return
        if fault.half:
            operation.half()
        self._met()
        if fault.kind in ERRORS:
            number = ERROR_NUMBERS[fault.kind]
            raise OSError(number, os.strerror(number), str(operation.path))
        os.kill(os.getpid(), signal.SIGSTOP if fault.kind == "stop" else signal.SIGKILL)
