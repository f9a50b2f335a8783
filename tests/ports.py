"""Ports for the jobs that tests start. Each is given once on this machine, for as long as the tests run.

A port that is asked of the kernel and closed again may be anyone's by the time a job binds it, seconds later.
They are of a range from which the kernel gives nothing away, and a locked file keeps other test runs off.
"""

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path
from typing import IO

KERNELS_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
FIRST, LAST = 20000, 65535
_held: list[IO[str]] = []  # the kernel lets go of the locks when this process ends


def reserve_port() -> int:
    """A port that nobody uses, and that nobody else is given until this process ends."""
    folder = Path(tempfile.gettempdir(), f"megalite-ports-{os.getuid()}")
    folder.mkdir(exist_ok=True)
    ports = candidates()
    for port in random.SystemRandom().sample(ports, len(ports)):
        lock = (folder / str(port)).open("w")
        if _is_ours(lock) and _is_free(port):
            _held.append(lock)
            return port
        lock.close()
    raise RuntimeError(f"no port from {ports[0]} to {ports[-1]} is free")


def candidates() -> list[int]:
    """Ports that the kernel does not give away by itself; all that there are if it gives away any."""
    low, high = map(int, KERNELS_RANGE.read_text().split()) if KERNELS_RANGE.exists() else (32768, 60999)
    outside = [port for port in range(FIRST, LAST + 1) if not low <= port <= high]
    return outside or list(range(FIRST, LAST + 1))


def _is_ours(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
