"""The watch that rank 0 keeps over all ranks, for `liveness.py`: see there for the idea and the messages."""

import contextlib
import json
import os
import secrets
import selectors
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any, NoReturn

FAILED_GRACE_SECONDS = 0.3  # ranks that fail for the same reason do so together, and are reported once
LEAVING_SECONDS = 3.0  # how long rank 0 waits for the others to be gone, so that it is the last to leave
KEEPALIVE_SECONDS = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # no power: known after 30


class Connection:
    """A socket that carries JSON objects, one per line."""

    def __init__(self, connected: socket.socket):
        self.socket = connected
        self._unfinished = b""
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE_SECONDS.items():
            if hasattr(socket, option):
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, **message: Any) -> None:
        """Send, even to a peer that may be gone: its absence is noticed where its messages are read."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The objects that arrived since the last call; None at the end, and if it is not our language."""
        try:
            data = self.socket.recv(1 << 16)
            *lines, self._unfinished = (self._unfinished + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        ours = all(isinstance(message, dict) for message in messages) and len(self._unfinished) < 1 << 20
        return messages if data and ours else None

    def hang_up(self) -> None:
        """End the connection on both sides, and with it a `receive` that another thread waits in."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.socket.close()


@dataclass
class Peer:
    """What the server knows of one rank. `gone`: it said goodbye, or its connection ended."""

    name: str
    connection: Connection
    failure: str = ""
    gone: bool = False


class Server(threading.Thread):
    """Collects hellos, failures, goodbyes and silence, and ends the job when it has to."""

    def __init__(self, world_size: int, connect_seconds: float):
        super().__init__(name="liveness-server", daemon=True)
        self._world_size = world_size
        self._connect_seconds = connect_seconds
        self._token = secrets.token_hex(16)  # a stranger who finds the port cannot end the job
        self._listener = _listen(world_size)
        self._selector = selectors.PollSelector()  # data of each key: (rank or None, connection)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._peers: dict[int, Peer] = {}
        self._failed: list[Peer] = []  # in order of arrival
        self._first_failure_at = 0.0

    def address(self, host: str) -> str:
        """What the ranks need to know to connect, as JSON."""
        port = self._listener.getsockname()[1]
        return json.dumps({"host": host, "port": port, "token": self._token, "name": process_name(0)})

    def run(self) -> None:
        started_at = time.monotonic()
        while not self._all_said_goodbye():
            for key in self._arrivals():
                self._take_in(key)
            if self._failures_are_complete():
                self._end_job(self._describe_failures())
            if self._missing() and time.monotonic() - started_at > self._connect_seconds:
                self._end_job(self._describe_missing())
        self.close()

    def close(self) -> None:
        for key in list(self._selector.get_map().values()):
            (key.data[1] if key.data else self._listener).close()

    def _arrivals(self) -> list[selectors.SelectorKey]:
        """Sockets with something to read; returns empty-handed only while a clock is running."""
        seconds = 0.1 if self._missing() or self._failed else None
        return [key for key, _ in self._selector.select(seconds)]

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
                self._note_failure(self._peers[rank], message["failed"])
            elif "goodbye" in message:
                self._peers[rank].gone = True
        return None

    def _welcome(self, message: dict[str, Any], connection: Connection) -> int | None:
        rank = message.get("hello")
        if message.get("token") != self._token or rank not in self._missing():
            return None
        self._peers[rank] = Peer(message["name"], connection)
        self._selector.modify(connection.socket, selectors.EVENT_READ, (rank, connection))
        if not self._missing():
            self._tell_all(complete=True)
        return rank

    def _note_failure(self, peer: Peer, reason: str) -> None:
        peer.failure = reason
        if not self._failed:
            self._first_failure_at = time.monotonic()
        self._failed.append(peer)

    def _mark_gone(self, rank: int) -> Peer | None:
        peer = self._peers[rank]
        was_expected = peer.gone or peer in self._failed
        peer.gone = True
        return None if was_expected else peer

    def _missing(self) -> list[int]:
        return [rank for rank in range(self._world_size) if rank not in self._peers]

    def _all_said_goodbye(self) -> bool:
        return not self._missing() and not self._failed and all(peer.gone for peer in self._peers.values())

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

    def _describe_missing(self) -> str:
        missing = self._missing()
        ranks = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
        return f"{ranks} did not connect to rank 0 within {self._connect_seconds:g} seconds"

    def _tell_all(self, **message: Any) -> None:
        for peer in self._peers.values():
            if not peer.gone:
                peer.connection.send(**message)

    def _end_job(self, reason: str) -> NoReturn:
        print_error(reason)
        if 0 in self._peers:
            self._peers[0].gone = True  # this process leaves last, by itself
        self._tell_all(end=True)
        give_up_at = time.monotonic() + LEAVING_SECONDS
        while time.monotonic() < give_up_at and not all(peer.gone for peer in self._peers.values()):
            for key, _ in self._selector.select(0.1):
                if key.data is not None:
                    self._read(*key.data)
        leave()


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


def leave(reason: str | None = None) -> NoReturn:
    """End this process now, whatever its main thread is doing."""
    if reason:
        print_error(reason)
    os._exit(1)
