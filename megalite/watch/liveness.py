"""One process that dies ends the whole job within seconds, with one line that names it.

A collective waits for a dead process until a timeout of many minutes. So a daemon thread of every rank holds
a socket to a server thread of rank 0. The kernel closes the sockets of a process whichever way it ends, also
by `kill -9`: a connection that ends without a goodbye is a death, seen at once. Rank 0 prints the line, tells
the others, and every process leaves by `os._exit`, which works while its main thread is blocked in a
collective. If rank 0 dies, every rank sees it, and rank 1 prints the line.

A process that lives and does nothing is noticed too, where a `HangWatch` says what its places allow: each
rank gives signs of life with the place that it has reached, and rank 0 judges (`hangs.py`). If rank 0 itself
is silent, rank 1 says so.

Messages are JSON, one per line. To the server: {"hello": rank, "token": ..., "name": ...},
{"failed": reason}, {"goodbye": true}; {"beat": mark}, {"report": ...}, {"written": ...}. From it:
{"complete": true} when all ranks are there, and {"end": status} when all must leave; {"heard": true} for each
beat, {"ask": true}, {"write": ranks that do not answer}.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from megalite.exit_status import FAILED, HANG
from megalite.watch.clock import AwakeClock
from megalite.watch.connection import Connection
from megalite.watch.hangs import Hangs
from megalite.watch.limits import Limits
from megalite.watch.server import LivenessError, Server, death_of, leave, print_error, process_name
from megalite.watch.witness import HangWatch, Witness

__all__ = ["Liveness", "LivenessError"]

FAILED_SECONDS = 30.0  # how long a failed rank waits to be ended before it ends itself


class Liveness:
    """This process's connection to rank 0. Every process of the job starts one, and closes it at the end."""

    def __init__(
        self,
        rank: int,
        rank_0: dict[str, Any],
        server: Server | None,
        connection: Connection,
        witness: Witness | None,
    ):
        self._rank = rank
        self._rank_0 = rank_0
        self._server = server
        self._witness = witness
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
        hang_watch: HangWatch | None = None,
    ) -> "Liveness":
        """Start watching, and being watched. Returns when all ranks are.

        `publish` is called once on every rank, on rank 0 with an address and elsewhere with None, and returns
        rank 0's address everywhere. `host` is the name by which the others reach rank 0 (its MASTER_ADDR). A
        rank that has not connected after `connect_seconds` is named, and ends the job. `hang_watch` says what
        hangs; without one nothing does.

        Raises LivenessError if rank 0 cannot be reached in that time, or cannot watch so many ranks.
        """
        witness = Witness(rank, world_size, hang_watch) if hang_watch else None
        process = witness.process.as_message() if witness else {}
        hangs = _hangs(world_size, hang_watch) if hang_watch and rank == 0 else None
        server = Server(world_size, connect_seconds, hangs) if rank == 0 else None
        address = json.loads(publish(server.address(host, process) if server else None))
        connection = _connect(address, rank, connect_seconds)
        liveness = cls(rank, address, server, connection, witness)
        os.register_at_fork(after_in_child=liveness._forget)
        mark = witness.beat() if witness else []
        name = process_name(rank)
        connection.send(hello=rank, token=address["token"], name=name, process=process, mark=mark)
        if server:
            server.start()
        liveness._watcher.start()
        liveness._complete.wait()
        return liveness

    def failed(self, message: str, status: int = FAILED) -> NoReturn:
        """End the job, with this rank and the first line of its reason on stderr.

        Exits with `status` where all ranks ask for it, else with 1: then it is not about the command.
        """
        reason = (message.strip() or "failed without a reason").splitlines()[0]
        sys.stdout.flush()
        sys.stderr.flush()
        self._connection.send(failed=reason, status=status)
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
        if self._witness:
            self._listen_and_beat(self._witness)
        else:
            self._listen()
        if not self._closing:
            leave(death_of(self._rank_0["name"]) if self._rank == 1 else None)

    def _listen(self) -> None:
        """Until the connection ends."""
        while (messages := self._connection.receive()) is not None:
            for message in messages:
                self._obey(message)

    def _listen_and_beat(self, witness: Witness) -> None:
        """Until the connection ends, or rank 0 is silent."""
        clock = AwakeClock(2 * witness.limits.beat_seconds)
        heard_at = beat_at = clock()
        while True:
            if self._connection.wait(max(0.0, beat_at - clock())):
                if (messages := self._connection.receive()) is None:
                    return
                heard_at = clock()
                for message in messages:
                    self._obey(message)
            if clock() >= beat_at:
                self._connection.send(beat=witness.beat())
                beat_at = clock() + witness.limits.beat_seconds
            if beyond := witness.misses_rank_0(clock() - heard_at):
                self._leave_rank_0(witness, beyond)

    def _obey(self, message: dict[str, Any]) -> None:
        if "complete" in message:
            self._complete.set()
        if "end" in message:
            leave(status=message["end"])
        if self._witness and "ask" in message:
            self._connection.send(report=self._witness.report())
        if self._witness and "write" in message:
            write = partial(self._write, self._witness, message["write"])
            threading.Thread(target=write, name="stacks", daemon=True).start()  # a disk may hang as well

    def _write(self, witness: Witness, others: dict[str, Any]) -> None:
        self._connection.send(written=witness.write(others))

    def _leave_rank_0(self, witness: Witness, beyond: str) -> NoReturn:
        """It is silent: rank 1 says so, before another rank leaves and a launcher ends all."""
        if self._rank == 1:
            print_error(
                f"{self._rank_0['name']} {witness.describe_rank_0(self._rank_0['process'])}: {beyond}"
            )
            witness.write({"0": self._rank_0["process"]} if witness.sees(self._rank_0["process"]) else {})
        else:
            time.sleep(2 * witness.limits.beat_seconds)
            witness.write({})
        leave(status=HANG)

    def _forget(self) -> None:
        """In a forked child: drop the copies of the sockets, which would hide the death of this process."""
        self._connection.close()
        if self._server:
            self._server.close()


def _hangs(world_size: int, watch: HangWatch) -> Hangs:
    limits = Limits(watch.limits, world_size)
    return Hangs(limits, str(watch.folder), AwakeClock(max(2.0, limits.beat_seconds)))


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
