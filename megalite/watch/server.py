"""The watch that rank 0 keeps over all ranks, for `liveness.py`: see there for the idea and the messages."""

import contextlib
import json
import os
import resource
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from megalite.error import UserError
from megalite.exit_status import FAILED, HANG
from megalite.watch.connection import Connection
from megalite.watch.hangs import Hangs

FAILED_GRACE_SECONDS = 0.3  # ranks that fail for the same reason do so together, and are reported once
LEAVING_SECONDS = 3.0  # how long rank 0 waits for the others to be gone, so that it is the last to leave
SPARE_FILES = 512  # beside the sockets of all ranks, for what rank 0 opens otherwise


class LivenessError(UserError):
    """Rank 0 cannot be reached, or cannot watch so many ranks."""


@dataclass
class Peer:
    """What the server knows of one rank. `gone`: it said goodbye, or its connection ended."""

    name: str
    connection: Connection
    failure: str = ""
    status: int = FAILED  # that the failure asks for
    gone: bool = False


class Server(threading.Thread):
    """Collects hellos, failures, goodbyes and silence, and ends the job when it has to."""

    def __init__(self, world_size: int, connect_seconds: float, hangs: Hangs | None = None):
        super().__init__(name="liveness-server", daemon=True)
        _allow_open_files(world_size)
        self._world_size = world_size
        self._hangs = hangs
        self._connect_seconds = connect_seconds
        self._token = secrets.token_hex(16)  # a stranger who finds the port cannot end the job
        self._listener = _listen(world_size)
        self._selector = selectors.DefaultSelector()  # data of each key: (rank or None, connection)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._peers: dict[int, Peer] = {}
        self._num_gone = 0
        self._failed: list[Peer] = []  # in order of arrival
        self._first_failure_at = 0.0

    def address(self, host: str, process: Mapping[str, Any]) -> str:
        """What the ranks need to know to connect, and about the process of rank 0, as JSON."""
        port = self._listener.getsockname()[1]
        rank_0 = {"name": process_name(0), "process": process}
        return json.dumps({"host": host, "port": port, "token": self._token, **rank_0})

    def run(self) -> None:
        started_at = time.monotonic()
        while not self._all_said_goodbye():
            for key in self._arrivals():
                self._take_in(key)
            if self._failures_are_complete():
                self._end_job(self._describe_failures(), self._failures_status())
            if self._is_incomplete() and time.monotonic() - started_at > self._connect_seconds:
                self._end_job(self._describe_missing())
            if self._hangs:
                self._look_for_hangs(self._hangs)
        self.close()

    def close(self) -> None:
        for key in list(self._selector.get_map().values()):
            (key.data[1] if key.data else self._listener).close()

    def _arrivals(self) -> list[selectors.SelectorKey]:
        """Sockets with something to read; returns empty-handed only while a clock is running."""
        seconds = self._hangs.look_seconds if self._hangs else None
        if self._is_incomplete() or self._failed:
            seconds = 0.1
        return [key for key, _ in self._selector.select(seconds)]

    def _look_for_hangs(self, hangs: Hangs) -> None:
        for rank, order in hangs.orders().items():
            self._peers[rank].connection.send(**order)
        if hangs.verdict:
            self._end_job(hangs.verdict, HANG)

    def _take_in(self, key: selectors.SelectorKey) -> None:
        if key.data is None:
            self._accept()
        elif died := self._read(*key.data):
            self._end_job(death_of(died.name))

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except OSError:
            return  # it left before it was let in
        accepted.settimeout(1.0)  # a peer that does not read must not hold up the news for the others
        self._selector.register(accepted, selectors.EVENT_READ, (None, Connection(accepted)))

    def _read(self, rank: int | None, connection: Connection) -> Peer | None:
        """Take in what one connection brings; the peer whose connection ended without a goodbye, if any."""
        messages = connection.receive()
        if messages is None:
            self._selector.unregister(connection.socket)
            connection.close()
            return self._mark_gone(rank) if rank is not None else None
        for message in messages:
            if rank is None:
                rank = self._welcome(message, connection)
            elif "failed" in message:
                self._note_failure(self._peers[rank], message["failed"], message["status"])
            elif "goodbye" in message:
                self._mark_gone(rank)
            elif self._hangs:
                self._hangs.hear(rank, message)
                if "beat" in message:
                    connection.send(heard=True)
        return None

    def _welcome(self, message: dict[str, Any], connection: Connection) -> int | None:
        rank = message.get("hello")
        if message.get("token") != self._token or not isinstance(rank, int):
            return None
        if rank in self._peers or not 0 <= rank < self._world_size:
            return None
        self._peers[rank] = Peer(message["name"], connection)
        if self._hangs:
            self._hangs.watch(rank, message["name"], message)
        self._selector.modify(connection.socket, selectors.EVENT_READ, (rank, connection))
        if not self._is_incomplete():
            self._tell_all(complete=True)
        return rank

    def _note_failure(self, peer: Peer, reason: str, status: int) -> None:
        peer.failure, peer.status = reason, status
        if not self._failed:
            self._first_failure_at = time.monotonic()
        self._failed.append(peer)

    def _mark_gone(self, rank: int) -> Peer | None:
        peer = self._peers[rank]
        was_expected = peer.gone or peer in self._failed
        self._num_gone += not peer.gone
        peer.gone = True
        if self._hangs:
            self._hangs.release(rank)
        return None if was_expected else peer

    def _missing(self) -> list[int]:
        return [rank for rank in range(self._world_size) if rank not in self._peers]

    def _is_incomplete(self) -> bool:
        return len(self._peers) < self._world_size

    def _all_said_goodbye(self) -> bool:
        return self._num_gone == self._world_size and not self._failed

    def _failures_are_complete(self) -> bool:
        if len(self._failed) in (0, self._world_size):
            return bool(self._failed)
        return time.monotonic() - self._first_failure_at > FAILED_GRACE_SECONDS

    def _describe_failures(self) -> str:
        """The first failure; without a rank if all ranks share it: then it is not about a rank."""
        first = self._failed[0]
        num_alike = sum(peer.failure == first.failure for peer in self._failed)
        if num_alike == self._world_size:
            return first.failure
        others = f" and {num_alike - 1} more" if num_alike > 1 else ""
        return f"{first.name}{others}: {first.failure}"

    def _failures_status(self) -> int:
        """What all ranks ask for; one rank's own mistake says nothing about the command."""
        asked = {peer.status for peer in self._failed}
        return asked.pop() if len(self._failed) == self._world_size and len(asked) == 1 else FAILED

    def _describe_missing(self) -> str:
        missing = self._missing()
        ranks = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
        return f"{ranks} did not connect to rank 0 within {self._connect_seconds:g} seconds"

    def _tell_all(self, **message: Any) -> None:
        for peer in self._peers.values():
            if not peer.gone:
                peer.connection.send(**message)

    def _end_job(self, reason: str, status: int = FAILED) -> NoReturn:
        print_error(reason)
        if 0 in self._peers:
            self._mark_gone(0)  # this process leaves last, by itself
        self._tell_all(end=status)
        give_up_at = time.monotonic() + LEAVING_SECONDS
        while time.monotonic() < give_up_at and self._num_gone < len(self._peers):
            for key, _ in self._selector.select(0.1):
                if key.data is not None:
                    self._read(*key.data)
        leave(status=status)


def _allow_open_files(num_ranks: int) -> None:
    """Raise this process's limit of open files where it is low; LivenessError where it cannot be enough."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if hard != unlimited and hard <= num_ranks:
        raise LivenessError(
            f"rank 0 needs a connection to each of {num_ranks} ranks and may open {hard} files: "
            "raise its limit (ulimit -Hn)"
        )
    enough = num_ranks + SPARE_FILES
    if soft != unlimited and soft < enough:
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough if hard == unlimited else min(enough, hard), hard))


def _listen(world_size: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", 0), family=family, backlog=world_size, dualstack_ipv6=both)


def process_name(rank: int) -> str:
    """This process, as people find it."""
    return f"rank {rank} ({socket.gethostname()}, pid {os.getpid()})"


def death_of(name: str) -> str:
    return f"{name} died without a message: killed, out of memory, or crashed"


def print_error(reason: str) -> None:
    """One write to the file itself: the blocked main thread may hold the lock of `sys.stderr`."""
    start = "\n" if os.isatty(2) else ""  # leave the line of a progress bar
    with contextlib.suppress(OSError):  # if nobody listens, the others must still be told
        os.write(2, f"{start}error: {reason}\n".encode())


def leave(reason: str | None = None, status: int = FAILED) -> NoReturn:
    """End this process now, whatever its main thread is doing."""
    if reason:
        print_error(reason)
    os._exit(status)
