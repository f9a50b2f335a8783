"""Spans of one rank's time, noted while it works; on a GPU without holding it up."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch

What = TypeVar("What")


class Clock(Protocol):
    """Stamps are cheap to take, and read when all is over."""

    def stamp(self) -> Any:
        """Now, for `seconds`."""

    def seconds(self, stamp: Any) -> float:
        """A stamp as `time.perf_counter` would have had it."""


class HostClock:
    """Of a rank that computes on the host."""

    def stamp(self) -> float:
        return time.perf_counter()

    def seconds(self, stamp: float) -> float:
        return stamp


class DeviceClock:
    """Of a rank that computes on a GPU: stamps are events of the current stream, put behind its work."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)
        self._first = self.stamp()
        torch.cuda.synchronize(device)
        self._first_seconds = time.perf_counter()

    def stamp(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, stamp: torch.cuda.Event) -> float:
        stamp.synchronize()
        return self._first_seconds + self._first.elapsed_time(stamp) / 1000


def clock_of(device: torch.device) -> Clock:
    """The clock of what computes on a device."""
    return DeviceClock(device) if device.type == "cuda" else HostClock()


class Noted(NamedTuple):
    """One span: in which lane, of what, in seconds of `time.perf_counter`."""

    lane: str
    what: Any
    begin_seconds: float
    end_seconds: float


class Recorder(Generic[What]):
    """Notes the time of blocks; those that fail are not noted.

    with recorder("compute", action): ...
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._stamps: list[tuple[str, What, Any, Any]] = []

    @contextmanager
    def __call__(self, lane: str, what: What) -> Iterator[None]:
        begin = self._clock.stamp()
        yield
        self._stamps.append((lane, what, begin, self._clock.stamp()))

    def noted(self) -> list[Noted]:
        """All blocks so far, in the order of their ends."""
        read = self._clock.seconds
        return [Noted(lane, what, read(begin), read(end)) for lane, what, begin, end in self._stamps]
