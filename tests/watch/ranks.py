"""Processes that watch each other, as the ranks of a job do, for the tests of that watch."""

import ctypes
import multiprocessing
import os
import signal
import sys
import time

from megalite.exit_status import FAILED
from megalite.watch.liveness import Liveness

FORK = multiprocessing.get_context("fork")
HOST = "127.0.0.1"
KILLED, ENDED, FINISHED = -signal.SIGKILL, FAILED, 0


def wait_in_c(liveness=None, rank=None, folder=None):
    """Hold the main thread in C for a minute, where no Python handler or exception reaches it."""
    ctypes.CDLL(None).sleep(60)


class Job:
    """Processes that run `body(liveness, rank, folder)`, all with the same file as stderr."""

    def __init__(self, folder, world_size, body, connect_seconds=30.0, num_absent=0, hang_watch=None):
        self.folder = folder
        self.processes = []
        num_present = world_size - num_absent
        for rank in range(num_present):
            arguments = (folder, rank, world_size, body, connect_seconds, num_present, hang_watch)
            self.processes.append(FORK.Process(target=run_rank, args=arguments, daemon=True))
            self.processes[-1].start()

    def wait_until_all_are_ready(self):
        wait_for(lambda: len(list(self.folder.glob("ready-*"))) == len(self.processes))

    def kill(self, rank):
        self.signal(rank, signal.SIGKILL)

    def signal(self, rank, number):
        os.kill(self.processes[rank].pid, number)

    def printed(self):
        return (self.folder / "stderr").read_text()

    def end(self, within_seconds=15.0):
        """The exit codes, once all processes are gone, and what was printed. It takes a second at most where
        nothing else keeps the cores; whoever is not ended stays for half a minute or longer."""
        wait_for(lambda: all(process.exitcode is not None for process in self.processes), within_seconds)
        codes = [process.exitcode for process in self.processes]
        return codes, self.printed()

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()


def run_rank(folder, rank, world_size, body, connect_seconds, num_present, hang_watch):
    stderr = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stderr, 2)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    publish = publisher(folder, rank, num_present)
    liveness = Liveness.start(
        rank, world_size, publish, host=HOST, connect_seconds=connect_seconds, hang_watch=hang_watch
    )
    (folder / f"ready-{rank}").touch()
    body(liveness, rank, folder)


def publisher(folder, rank, num_present):
    def publish(address):
        """Through a file; as a job's process group does, it lets nobody go on before all are there."""
        file = folder / "address"
        if address is not None:
            file.with_suffix(".tmp").write_text(address)
            file.with_suffix(".tmp").rename(file)
        wait_for(file.exists)
        (folder / f"knows-{rank}").touch()
        wait_for(lambda: len(list(folder.glob("knows-*"))) == num_present)
        return file.read_text()

    return publish


def wait_for(condition, seconds=30.0):
    give_up_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up_at, "waited in vain"
        time.sleep(0.01)
