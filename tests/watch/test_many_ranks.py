"""The watch of 4,096 ranks: one server, as many connections, eight times the load that such a job has."""

import json
import multiprocessing
import os
import resource
import socket
import time

import psutil
import pytest

from megalite.exit_status import HANG
from megalite.watch import limits
from megalite.watch.clock import AwakeClock
from megalite.watch.hangs import Hangs
from megalite.watch.limits import Limit, Limits
from megalite.watch.marks import Mark
from megalite.watch.server import LivenessError, Server

WORLD_SIZE, VICTIM = 4096, 3000
TIMES_THE_LOAD = 8  # so that a test need not wait for signs of life that come every 16 seconds
BEAT_SECONDS = WORLD_SIZE / limits.BEATS_PER_SECOND / TIMES_THE_LOAD
MEASURED_SECONDS = 8.0
SPARE_FILES = 600
SLICES = 20  # of the ranks, which speak one after the other
SILENT = Limit(600.0, "watch.step_seconds", 1.0, "watch.stopped_seconds")
# Times what it costs to speak, which is as slow as the machine is: measured 3. A server that looks at all
# ranks for each sign of life fills a core: 16.
MOST_TO_LISTEN = 8.0


class Rank:
    """One end of a connection, which speaks for a rank."""

    def __init__(self, rank, address):
        self.socket = socket.create_connection((address["host"], address["port"]))
        self.socket.setblocking(False)
        hello = {"hello": rank, "token": address["token"], "name": f"rank {rank}"}
        self.say(**hello, process={"pid": 0, "node": "", "dump_fd": -1}, mark=list(Mark(1, "work", 1)))
        self.is_complete = False

    def say(self, **message):
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def answer(self):
        """Read what has come, and do what it asks."""
        try:
            heard = self.socket.recv(1 << 16)
        except BlockingIOError:
            return
        self.is_complete |= b"complete" in heard
        if b"ask" in heard:
            self.say(report={"mark": list(Mark(1, "work", 1)), "frame": "all_reduce", "waits": True})
        if b"write" in heard:
            self.say(written={})


def serve(server, folder):
    stderr = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT)
    os.dup2(stderr, 2)
    server.run()


@pytest.fixture
def many_files():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < WORLD_SIZE + SPARE_FILES:
        pytest.skip(f"needs {WORLD_SIZE + SPARE_FILES} open files, the hard limit is {before[1]}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (WORLD_SIZE + SPARE_FILES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def beat(ranks, seconds):
    """All ranks in turn, for so long; ends early when the server has left."""
    started = time.monotonic()
    for number in range(round(seconds / BEAT_SECONDS * SLICES)):
        try:
            for rank in ranks[number % SLICES :: SLICES]:
                rank.answer()
                rank.say(beat=list(Mark(1, "work", 1)))
        except OSError:
            return
        time.sleep(max(0.0, started + (number + 1) * BEAT_SECONDS / SLICES - time.monotonic()))


def test_4096_ranks_are_watched_at_little_cost_and_one_that_is_silent_is_named(
    many_files, tmp_path, monkeypatch
):
    monkeypatch.setattr(limits, "BEATS_PER_SECOND", limits.BEATS_PER_SECOND * TIMES_THE_LOAD)
    known = Limits({"work": SILENT}, WORLD_SIZE)
    assert known.beat_seconds == BEAT_SECONDS
    server = Server(WORLD_SIZE, 120.0, Hangs(known, str(tmp_path), AwakeClock(2.0)))
    address = json.loads(server.address("127.0.0.1", {}))
    process = multiprocessing.get_context("fork").Process(target=serve, args=(server, tmp_path), daemon=True)
    process.start()
    server.close()
    started = time.monotonic()
    ranks = [Rank(rank, address) for rank in range(WORLD_SIZE)]
    while not all(rank.is_complete for rank in ranks):
        assert time.monotonic() - started < 120
        for rank in ranks:
            rank.answer()
    connected_seconds = time.monotonic() - started

    usage = psutil.Process(process.pid)
    before, spoken = sum(usage.cpu_times()[:2]), time.process_time()
    beat(ranks, MEASURED_SECONDS)
    listening, speaking = sum(usage.cpu_times()[:2]) - before, time.process_time() - spoken
    assert process.exitcode is None and (tmp_path / "stderr").read_text() == ""
    rate = f"{WORLD_SIZE / BEAT_SECONDS:.0f} signs of life per second"
    print(f"connected in {connected_seconds:.1f} s; {rate}: {listening / MEASURED_SECONDS:.1%} of a core")
    assert listening < MOST_TO_LISTEN * speaking, f"{listening:.2f} and {speaking:.2f} s"

    victim = ranks.pop(VICTIM)
    while process.exitcode is None:
        assert time.monotonic() - started < 240
        beat(ranks, BEAT_SECONDS)
    assert process.exitcode == HANG
    found = (tmp_path / "stderr").read_text()
    assert (
        found.startswith(f"error: rank {VICTIM} does not answer") and "at step 1, work: no sign of" in found
    )
    victim.socket.close()


def test_more_ranks_than_this_process_may_open_files_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 1024))
    with pytest.raises(LivenessError, match="each of 2000 ranks and may open 1024 files: raise"):
        Server(2000, 30.0)
