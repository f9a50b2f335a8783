"""Time as the watch counts it: only while it was awake itself."""

import time
from collections.abc import Callable


class AwakeClock:
    """Seconds since its birth, in which no reading is further from the one before than `most_seconds`.

    Read it more often than that. Where a laptop sleeps, or a whole job is stopped and continued, the system's
    clock jumps for all ranks at once, none of which had a chance to speak; this one takes a small step.
    """

    def __init__(self, most_seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._most_seconds, self._now = most_seconds, now
        self._seconds, self._read_at = 0.0, now()

    def __call__(self) -> float:
        now = self._now()
        self._seconds += min(now - self._read_at, self._most_seconds)
        self._read_at = now
        return self._seconds
