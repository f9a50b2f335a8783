"""What one rank says about itself to the watch: signs of life, and on demand where it is and its stacks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalite.watch.limits import Limit, Limits
from megalite.watch.marks import Marks
from megalite.watch.stacks import (
    FROZEN,
    WRITE_SECONDS,
    Process,
    describe,
    main_frames,
    state_of,
    write_own_stacks,
    write_stacks_of,
)


@dataclass(frozen=True)
class HangWatch:
    """What a job tells its watch about its work; the same on every rank but for the marks.

    limits: of each place that is marked.
    folder: that receives the stacks, a file per rank.
    waits_in: a frame whose FILE:FUNCTION contains one of these waits for other ranks.
    """

    marks: Marks
    limits: Mapping[str, Limit]
    folder: Path
    waits_in: Sequence[str] = ()


class Witness:
    """One rank's answers to the watch, given by its liveness thread while its main thread does whatever."""

    def __init__(self, rank: int, world_size: int, watch: HangWatch) -> None:
        self._rank, self._watch = rank, watch
        self.limits = Limits(watch.limits, world_size)
        self.process = Process.own()
        self._is_written = False

    def beat(self) -> list[Any]:
        """A sign of life: the latest mark."""
        return list(self._watch.marks.last)

    def report(self) -> dict[str, Any]:
        """What the main thread executes now, and whether that is a wait for others. Reads no file."""
        frames = list(main_frames())
        codes = [f"{frame.f_code.co_filename}:{frame.f_code.co_name}" for frame in frames]
        waits = any(part in code for code in codes for part in self._watch.waits_in)
        return {"mark": self.beat(), "frame": describe(frames), "waits": waits}

    def misses_rank_0(self, seconds: float) -> str | None:
        """Which limit rank 0 is beyond after so many seconds of silence; its debugger may hold it."""
        allowed = WRITE_SECONDS if self._is_written else 0.0
        return self.limits.too_silent(self._watch.marks.last.place, seconds - allowed)

    def sees(self, process: Mapping[str, Any]) -> bool:
        """Whether that process is of this node."""
        return bool(self.process.node) and process["node"] == self.process.node

    def describe_rank_0(self, process: Mapping[str, Any]) -> str:
        """What its process does, as far as it is seen, while this rank is where it is."""
        state = state_of(process["pid"]) if self.sees(process) else FROZEN
        return f"{state} while rank {self._rank} is at {self._watch.marks.last}"

    def write(self, others: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Write this rank's stacks, and those of ranks of this node that do not answer.

        others: by rank, each a process. Returns their states by rank, and an "error" if there was one.
        """
        self._is_written = True
        written: dict[str, Any] = {}
        try:
            write_own_stacks(self._path(self._rank), f"rank {self._rank} at {self._watch.marks.last}")
            for rank, process in others.items():
                title = f"rank {rank}, which does not answer, as rank {self._rank} finds it"
                written[rank] = write_stacks_of(Process(**process), self._path(int(rank)), title)
        except OSError as error:
            written["error"] = f"{error.filename or self._watch.folder}: {error.strerror}"
        return written

    def _path(self, rank: int) -> Path:
        return self._watch.folder / f"rank-{rank:05d}.txt"
