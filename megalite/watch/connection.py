"""A socket between two processes of a job, in the language of the watch: JSON objects, one per line."""

import contextlib
import json
import select
import socket
import threading
from typing import Any

KEEPALIVE_SECONDS = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # no power: known after 30


class Connection:
    """A socket that carries JSON objects, one per line. Any thread may send."""

    def __init__(self, connected: socket.socket):
        self.socket = connected
        self._unfinished = b""
        self._sending = threading.Lock()
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE_SECONDS.items():
            if hasattr(socket, option):
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, **message: Any) -> None:
        """Send, even to a peer that may be gone: its absence is noticed where its messages are read."""
        with contextlib.suppress(OSError), self._sending:
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def wait(self, seconds: float) -> bool:
        """Whether something is there to be received: as soon as it is, or after so many seconds."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return bool(poll.poll(1000 * seconds))

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
