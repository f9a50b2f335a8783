"""Ranks that meet through a store, before any process group is: one that stays away is named, not waited for.

Each rank lays down what it found, rank 0 collects, judges, and lays down what all are to do:

    rank r   set who/r ... wait for who/verdict        rank 0   check who/0 ... who/N-1, set who/verdict
"""

import json
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import DistError, Store, TCPStore

from megalite.error import UserError

Result = TypeVar("Result")
POLL_SECONDS = 0.05
GRACE_SECONDS = 10.0  # for rank 0 to judge


class MeetingError(UserError):
    """Rank 0 is not there."""


class StuckError(UserError):
    """Something did not end in its time."""


def open_store(address: str, port: int, *, serves: bool, seconds: float) -> TCPStore:
    """The store at an address, served by this process or another. MeetingError where it cannot be had."""
    where, limit = f"rank 0 at {address}:{port}", timedelta(seconds=seconds)
    if not serves and not _answers(address, port, seconds):  # torch would tell it in forty lines
        advice = "check MASTER_ADDR and the network between nodes"
        raise MeetingError(f"{where} does not answer in {seconds:.0f} s: {advice}")
    try:
        return TCPStore(address, port, is_master=serves, timeout=limit, wait_for_workers=False)
    except DistError as error:
        said = str(error).rpartition("message: ")[2].splitlines()[0]
        raise MeetingError(f"{where} cannot be met: {said}: choose another MASTER_PORT") from None


def _answers(address: str, port: int, seconds: float) -> bool:
    """Whether somebody listens at an address, now or within a time."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        try:
            socket.create_connection((address, port), timeout=left).close()
            return True
        except OSError:
            time.sleep(POLL_SECONDS)
    return False


class Meeting:
    """The ranks of a job, by way of a store; `seconds` is how long one is waited for."""

    def __init__(self, store: Store, rank: int, world_size: int, seconds: float) -> None:
        self.store, self.rank, self.world_size, self.seconds = store, rank, world_size, seconds
        self._present = set(range(world_size))

    def decide(self, topic: str, value: Any, judge: Callable[[dict[int, Any]], Any]) -> Any:
        """What judge({rank: value of those that came}) gives on rank 0, on every rank. All must be JSON.

        Raises MeetingError where rank 0 gives nothing.
        """
        self.store.set(f"{topic}/{self.rank}", json.dumps(value))
        if self.rank == 0:
            verdict = judge(self._collect(topic))
            self.store.set(f"{topic}/verdict", json.dumps(verdict))
            return verdict
        limit = self.seconds + GRACE_SECONDS
        try:
            self.store.wait([f"{topic}/verdict"], timedelta(seconds=limit))
            return json.loads(self.store.get(f"{topic}/verdict"))
        except DistError:
            raise MeetingError(f"rank 0 was lost, or silent for {limit:.0f} s, after {topic}") from None

    def leave(self) -> None:
        """Say goodbye; rank 0, which may serve the store, goes last."""
        self.store.set(f"left/{self.rank}", "")
        if self.rank == 0:
            self._await("left", GRACE_SECONDS)

    def _collect(self, topic: str) -> dict[int, Any]:
        self._present -= self._await(topic, self.seconds)
        return {rank: json.loads(self.store.get(f"{topic}/{rank}")) for rank in sorted(self._present)}

    def _await(self, topic: str, seconds: float) -> set[int]:
        """Those of the ranks that are there that have not laid down anything in that time."""
        deadline, absent = time.monotonic() + seconds, self._present
        while absent := {rank for rank in absent if not self.store.check([f"{topic}/{rank}"])}:
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
        return absent


def within(seconds: float, what: str, work: Callable[[], Result]) -> Result:
    """What work() gives, or its error; StuckError where it takes longer: its thread is left behind."""
    outcome: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # raised again below, in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name=what, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not outcome:
        raise StuckError(f"{what} did not end in {seconds:.0f} s")
    return outcome[0]
