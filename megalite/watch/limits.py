"""How long a rank may stay in a place, and how long it may be silent."""

from collections.abc import Mapping
from dataclasses import dataclass, field

BEATS_PER_SECOND = 256  # of all ranks together: what rank 0 takes in beside its training, measured in tests
MISSED_BEATS = 3  # that a rank is allowed, however short its limit is


@dataclass(frozen=True)
class Limit:
    """What a place allows, in seconds; inf allows everything.

    factor: times the longest stay so far, where that is longer than `seconds`; 0 learns nothing.
    setting: the key by which a person changes `seconds`; silent_setting: that of `silent_seconds`.
    """

    seconds: float
    setting: str
    silent_seconds: float
    silent_setting: str
    factor: float = 0.0


@dataclass
class Limits:
    """The limits of each place, with what the run has taught about them so far."""

    of_place: Mapping[str, Limit]
    world_size: int
    _longest: dict[str, float] = field(default_factory=dict)

    @property
    def beat_seconds(self) -> float:
        """How often each rank gives a sign of life."""
        shortest = min(min(limit.seconds, limit.silent_seconds) for limit in self.of_place.values())
        return max(min(1.0, shortest / MISSED_BEATS), self.world_size / BEATS_PER_SECOND)

    def learn(self, place: str, seconds: float) -> None:
        """All ranks went on after so long in a place."""
        self._longest[place] = max(seconds, self._longest.get(place, 0.0))

    def seconds(self, place: str) -> float:
        """How long a rank may stay there by now."""
        limit = self.of_place[place]
        return max(limit.seconds, limit.factor * self._longest.get(place, 0.0))

    def silent_seconds(self, place: str) -> float:
        """How long a rank may be silent there."""
        return max(self.of_place[place].silent_seconds, MISSED_BEATS * self.beat_seconds)

    def too_silent(self, place: str, seconds: float) -> str | None:
        """Whether a rank that was last heard of at a place is silent for too long: both numbers, the key."""
        most = self.silent_seconds(place)
        return _beyond("sign of life", seconds, most, self.of_place[place].silent_setting)

    def too_long(self, place: str, seconds: float) -> str | None:
        """The same of a stay there."""
        return _beyond("progress", seconds, self.seconds(place), self.of_place[place].setting)


def _beyond(what: str, seconds: float, most: float, setting: str) -> str | None:
    if seconds <= most:
        return None
    return f"no {what} for {seconds:.1f} seconds, at most {most:.1f} expected ({setting})"
