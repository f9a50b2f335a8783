"""One process that dies ends the whole job within seconds, with one line that names it.

A collective waits for a dead process until a timeout of many minutes. So a daemon thread of every rank holds
a socket to a server thread of rank 0. The kernel closes the sockets of a process whichever way it ends, also
by `kill -9`: a connection that ends without a goodbye is a death, seen at once. Rank 0 prints the line, tells
the others, and every process leaves by `os._exit`, which works while its main thread is blocked in a
collective. If rank 0 dies, every rank sees it, and rank 1 prints the line.

Messages are JSON, one per line. To the server: {"hello": rank, "token": ..., "name": ...},
{"failed": reason}, {"goodbye": true}. From it: {"complete": true} when all ranks are there, and
{"end": true} when all must leave.
"""

import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from megalite.error import UserError
from megalite.watch.server import Connection, Server, death_of, leave, process_name

FAILED_SECONDS = 30.0  # how long a failed rank waits to be ended before it ends itself


class LivenessError(UserError):
    """Rank 0 cannot be reached."""


class Liveness:
    """This process's connection to rank 0. Every process of the job starts one, and closes it at the end."""

    def __init__(self, rank: int, name_of_rank_0: str, server: Server | None, connection: Connection):
        self._rank = rank
        self._name_of_rank_0 = name_of_rank_0
        self._server = server
        self._connection = connection
        self._closing = False
        self._complete = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="liveness", daemon=True)

    @classmethod
    def start(
        cls,
        rank: int,
        world_size: int,
        publish: Callable[[str | None], str],
        *,
        host: str,
        connect_seconds: float = 30.0,
    ) -> "Liveness":
        """Start watching, and being watched. Returns when all ranks are.

        `publish` is called once on every rank, on rank 0 with an address and elsewhere with None, and returns
        rank 0's address everywhere. `host` is the name by which the others reach rank 0 (its MASTER_ADDR). A
        rank that has not connected after `connect_seconds` is named, and ends the job.

        Raises LivenessError if rank 0 cannot be reached in that time.
        """
        server = Server(world_size, connect_seconds) if rank == 0 else None
        address = json.loads(publish(server.address(host) if server else None))
        connection = _connect(address, rank, connect_seconds)
        liveness = cls(rank, address["name"], server, connection)
        os.register_at_fork(after_in_child=liveness._forget)
        connection.send(hello=rank, token=address["token"], name=process_name(rank))
        if server:
            server.start()
        liveness._watcher.start()
        liveness._complete.wait()
        return liveness

    def failed(self, message: str) -> NoReturn:
        """End the job, with this rank and the first line of its reason on stderr. Exits with code 1."""
        reason = (message.strip() or "failed without a reason").splitlines()[0]
        sys.stdout.flush()
        sys.stderr.flush()
        self._connection.send(failed=reason)
        self._watcher.join(FAILED_SECONDS)  # ends the process
        leave(f"{process_name(self._rank)}: {reason}")

    def close(self) -> None:
        """Say goodbye, with nothing to report. Rank 0 stays until all have, watching those that are left."""
        self._closing = True
        self._connection.send(goodbye=True)
        if self._server:
            self._server.join()
        self._connection.hang_up()
        self._watcher.join()
        self._connection.close()

    def _watch(self) -> None:
        while (messages := self._connection.receive()) is not None:
            if any("complete" in message for message in messages):
                self._complete.set()
            if any("end" in message for message in messages):
                leave()
        if not self._closing:
            leave(death_of(self._name_of_rank_0) if self._rank == 1 else None)

    def _forget(self) -> None:
        """In a forked child: drop the copies of the sockets, which would hide the death of this process."""
        self._connection.close()
        if self._server:
            self._server.close()


def _connect(address: dict[str, Any], rank: int, connect_seconds: float) -> Connection:
    try:
        connected = socket.create_connection((address["host"], address["port"]), timeout=connect_seconds)
    except OSError as error:
        raise LivenessError(
            f"{process_name(rank)} cannot reach rank 0 at {address['host']}:{address['port']} ({error}): "
            "check MASTER_ADDR and the firewall between the nodes"
        ) from error
    connected.settimeout(None)
    return Connection(connected)
