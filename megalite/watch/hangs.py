"""What rank 0 knows of where every rank is, and what follows when one stays there.

A rank beyond a limit is suspected: all ranks are asked where they are. If it still has not moved, all that
answered write their stacks, and those of the silent ones of their node. Then there is a verdict.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megalite.watch.limits import Limits
from megalite.watch.marks import Mark
from megalite.watch.stacks import WRITE_SECONDS
from megalite.watch.verdict import Account, verdict

REPORT_SECONDS = 5.0  # in which a rank whose threads run has answered
LOOKS_PER_BEAT = 4

Order = dict[str, Any]


@dataclass
class Watched:
    """A rank as rank 0 hears it. heard_at: by the watch's clock, in seconds."""

    name: str
    process: Mapping[str, Any]
    mark: Mark
    heard_at: float
    report: Mapping[str, Any] | None = None
    written: bool = False
    state: str = ""

    def account(self) -> Account:
        report = self.report or {"frame": None, "waits": False}
        return Account(self.name, self.mark, report["frame"], report["waits"], self.state)


class Hangs:
    """The ranks that are watched. Rank 0 hands it their messages, and sends what it orders.

    clock: seconds, as an AwakeClock tells them.
    """

    def __init__(self, limits: Limits, folder: str, clock: Callable[[], float]) -> None:
        self.look_seconds = limits.beat_seconds / LOOKS_PER_BEAT
        self.verdict: str | None = None  # why the job must end
        self._limits, self._folder, self._clock = limits, folder, clock
        self._watched: dict[int, Watched] = {}
        self._look_at = 0.0
        self._front: Mark | None = None  # of the rank that is furthest behind
        self._front_since = 0.0
        self._suspect: int | None = None
        self._beyond = ""
        self._asked_at = 0.0
        self._writing_since: float | None = None
        self._errors: list[str] = []

    def watch(self, rank: int, name: str, hello: Mapping[str, Any]) -> None:
        """A rank has come."""
        now = self._clock()
        self._watched[rank] = Watched(name, hello["process"], Mark(*hello["mark"]), now)

    def release(self, rank: int) -> None:
        """A rank has left."""
        self._watched.pop(rank, None)

    def hear(self, rank: int, message: Mapping[str, Any]) -> None:
        """Take in what a rank says of itself."""
        if (watched := self._watched.get(rank)) is None:
            return
        watched.heard_at = self._clock()
        if "beat" in message:
            watched.mark = Mark(*message["beat"])
        elif "report" in message:
            watched.report = message["report"]
            watched.mark = Mark(*message["report"]["mark"])
        elif "written" in message:
            self._note_written(rank, message["written"])

    def orders(self) -> dict[int, Order]:
        """What is to be sent to which rank now; looks at the clock, and may reach a verdict."""
        now = self._clock()
        if now < self._look_at:
            return {}
        self._look_at = now + self.look_seconds
        self._advance(now)
        if self._suspect is None:
            return self._look(now)
        if self._writing_since is None:
            return self._hear_out(now)
        if now - self._writing_since > WRITE_SECONDS or all(w.written for w in self._reporters().values()):
            self._conclude()
        return {}

    def _note_written(self, rank: int, written: Mapping[str, str]) -> None:
        self._watched[rank].written = True
        for key, value in written.items():
            if key == "error":
                self._errors.append(value)
            elif int(key) in self._watched:
                self._watched[int(key)].state = value

    def _advance(self, now: float) -> None:
        """The rank that is furthest behind sets the pace: those ahead wait for it, wherever they are."""
        front = min((watched.mark for watched in self._watched.values()), default=None)
        if front != self._front:
            if self._front:
                self._limits.learn(self._front.place, now - self._front_since)
            self._front, self._front_since = front, now

    def _exceeding(self, now: float) -> Iterator[tuple[int, str]]:
        """Ranks beyond a limit, and which."""
        for rank, watched in self._watched.items():
            if beyond := self._limits.too_silent(watched.mark.place, now - watched.heard_at):
                yield rank, beyond
            is_behind = watched.mark == self._front
            if is_behind and (beyond := self._limits.too_long(watched.mark.place, now - self._front_since)):
                yield rank, beyond

    def _look(self, now: float) -> dict[int, Order]:
        """Whoever is beyond a limit is suspected; all are asked."""
        if (found := next(self._exceeding(now), None)) is None:
            return {}
        (self._suspect, self._beyond), self._asked_at = found, now
        return {rank: {"ask": True} for rank in self._watched}

    def _hear_out(self, now: float) -> dict[int, Order]:
        """Once all have answered, or could have: the suspect has moved, or all write their stacks."""
        if now - self._asked_at <= REPORT_SECONDS and len(self._reporters()) < len(self._watched):
            return {}
        if self._suspect not in dict(self._exceeding(now)):
            self._suspect = None
            for watched in self._watched.values():
                watched.report = None
            return {}
        self._writing_since = now
        return self._writing_orders()

    def _writing_orders(self) -> dict[int, Order]:
        """Each rank writes its own; the first of a node that answers also writes those that do not."""
        reporters = self._reporters()
        orders: dict[int, Order] = {rank: {"write": {}} for rank in reporters}
        first_of_node = {reporters[rank].process["node"]: rank for rank in sorted(reporters, reverse=True)}
        for rank, watched in self._watched.items():
            node = watched.process["node"]
            if rank not in reporters and node and node in first_of_node:
                orders[first_of_node[node]]["write"][str(rank)] = dict(watched.process)
        return orders

    def _reporters(self) -> dict[int, Watched]:
        return {rank: watched for rank, watched in self._watched.items() if watched.report is not None}

    def _conclude(self) -> None:
        accounts = {rank: watched.account() for rank, watched in self._watched.items()}
        stacks = f"not all stacks could be written: {self._errors[0]}" if self._errors else ""
        where = stacks or f"the stacks of all ranks are in {self._folder}"
        self.verdict = f"{verdict(accounts, self._beyond)}: {where}"
