"""What a benchmark yields, and how it measures: in turns, in fresh processes, by the median."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple


class Measurement(NamedTuple):
    """One quantity of megalite beside the same of a peer, from the same run; None where there is no peer.

    higher_is_better: for a speed; not for a time or an amount of memory.
    spread: of the rounds' advantages, or of their values where there is no peer.
    """

    name: str
    unit: str
    megalite: float
    peer: float | None = None
    higher_is_better: bool = True
    spread: tuple[float, float] | None = None

    @property
    def advantage(self) -> float | None:
        """How many times better megalite is; below 1 it is worse."""
        if self.peer is None:
            return None
        return self.megalite / self.peer if self.higher_is_better else self.peer / self.megalite


def median_seconds(bodies: dict[str, Callable[[], Any]], rounds: int = 5) -> dict[str, float]:
    """Median time of each body; they take turns."""
    return {name: statistics.median(values) for name, values in seconds_of_rounds(bodies, rounds).items()}


def seconds_of_rounds(
    bodies: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Time of each body in each round; they take turns, so that a busy machine is busy for all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in bodies}
    for _ in range(rounds):
        for name, body in bodies.items():
            started = clock()
            body()
            seconds[name].append(clock() - started)
    return seconds


def middle_half(values: Sequence[float]) -> tuple[float, float]:
    """Between which the middle half of the values lies; of three, all of them."""
    low, _, high = statistics.quantiles(values, n=4)
    return low, high


def in_fresh_process(body: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a module's function, called in a new process: nothing imported, nothing in memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # it may start others
        return pool.submit(body, *arguments).result()


class PeakMemory:
    """Bytes that the block added to the process at its peak (Linux).

    with PeakMemory() as memory: ...
    memory.bytes
    """

    bytes = 0

    def __enter__(self) -> "PeakMemory":
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts from here
        self._before = _status_bytes("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        self.bytes = _status_bytes("VmHWM") - self._before


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
