"""A process that lives and does nothing ends the job, which names it; the processes are real.

Limits are seconds here, so that tests are short; other work on the machine only delays what they wait for.
"""

import os
import re
import signal
import time

import pytest

from megalite.exit_status import HANG
from megalite.watch.hangs import REPORT_SECONDS
from megalite.watch.limits import Limit
from megalite.watch.marks import Marks
from megalite.watch.witness import HangWatch
from tests.watch.ranks import ENDED, FINISHED, KILLED, wait_for, wait_in_c
from tests.watch.test_liveness import name

SILENT_SECONDS, STAY_SECONDS = 3.0, 4.0
SILENT = SILENT_SECONDS, "watch.stopped_seconds"
PLACES = {
    "start": Limit(300.0, "start", 300.0, "start"),
    "work": Limit(STAY_SECONDS, "watch.step_seconds", *SILENT),
    "long work": Limit(300.0, "watch.saving_seconds", *SILENT),
}


def watch(folder):
    """For a job whose ranks inherit it: each marks its own copy."""
    return HangWatch(Marks("start"), PLACES, folder / "stacks", waits_in=("wait_in_c",))


class Worker:
    """What ranks do: all wait for the victim, which does something else; there is no debugger on PATH."""

    def __init__(self, hang_watch, victim, body, place):
        self.marks, self.victim, self.body, self.place = hang_watch.marks, victim, body, place

    def __call__(self, liveness, rank, folder):
        os.environ["PATH"] = ""
        self.marks(self.place, 1)
        (folder / f"works-{rank}").touch()
        self.body() if rank == self.victim else wait_in_c()


def start(job, tmp_path, world_size, victim, body=wait_in_c, place="work"):
    hang_watch = watch(tmp_path)
    running = job(world_size, Worker(hang_watch, victim, body, place), hang_watch=hang_watch)
    wait_for(lambda: len(list(tmp_path.glob("works-*"))) == world_size)
    return running


def ends_of(running, ranks, seconds=30.0):
    wait_for(lambda: all(running.processes[rank].exitcode is not None for rank in ranks), seconds)
    return {running.processes[rank].exitcode for rank in ranks}


def stacks(folder, rank):
    return (folder / "stacks" / f"rank-{rank:05d}.txt").read_text()


def test_a_stopped_rank_is_named_with_the_stacks_of_all(job, tmp_path):
    running = start(job, tmp_path, 3, victim=2, place="long work")
    time.sleep(SILENT_SECONDS)  # a sign of life tells where it is; until then nothing is amiss
    assert running.printed() == ""
    running.signal(2, signal.SIGSTOP)
    assert ends_of(running, [0, 1]) == {HANG}
    who = name(2, running.processes[2])
    assert re.fullmatch(
        rf"error: {who} is stopped \(SIGSTOP\) at step 1, long work: no sign of life for .*, at most 3.0 "
        rf"expected \(watch.stopped_seconds\): the stacks of all ranks are in {tmp_path}/stacks\n",
        running.printed(),
    )
    assert "wait_in_c" in stacks(tmp_path, 0) and "wait_in_c" in stacks(tmp_path, 1)
    assert "which does not answer, as rank 0 finds it\nis stopped" in stacks(tmp_path, 2)
    assert "wchan: do_signal_stop" in stacks(tmp_path, 2)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_stopped_rank_0_is_named_by_rank_1_alone(job, tmp_path, world_size):
    running = start(job, tmp_path, world_size, victim=0, place="long work")
    time.sleep(1.0)
    running.signal(0, signal.SIGSTOP)
    assert ends_of(running, range(1, world_size)) == {HANG}
    who = name(0, running.processes[0])
    where = r"is stopped \(SIGSTOP\) while rank 1 is at step 1, long work"
    assert re.fullmatch(rf"error: {who} {where}: no sign of life for .*\n", running.printed())
    assert all("wait_in_c" in stacks(tmp_path, rank) for rank in range(1, world_size))
    assert "wchan: do_signal_stop" in stacks(tmp_path, 0)


def hold_pythons_lock():
    time.sleep(1.5)  # gives a sign of life before, which says that start-up is over
    sum(range(10**11))  # minutes, in C


def test_a_rank_that_holds_pythons_lock_is_named_with_its_python_stack(job, tmp_path):
    running = start(job, tmp_path, 2, victim=1, body=hold_pythons_lock, place="long work")
    assert ends_of(running, [0]) == {HANG}
    assert "does not answer (native code holds Python's lock) at " in running.printed()
    assert "hold_pythons_lock" in stacks(tmp_path, 1)


def loop_for_ever():
    while True:
        time.sleep(0.01)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_busy_for_ever_is_named_and_not_those_that_wait_for_it(job, tmp_path, victim):
    running = start(job, tmp_path, 3, victim, loop_for_ever)
    assert ends_of(running, range(3)) == {HANG}
    who = name(victim, running.processes[victim])
    where = r"in loop_for_ever \(test_stopped.py:\d+\) at step 1, work"
    assert re.match(rf"error: {who} hangs {where}: no progress for .*watch.step_seconds", running.printed())
    assert "loop_for_ever" in stacks(tmp_path, victim)


def test_stacks_that_cannot_be_written_are_told_in_the_same_line(job, tmp_path):
    (tmp_path / "stacks").write_text("a file where the folder should be")
    running = start(job, tmp_path, 2, 1, loop_for_ever)
    assert ends_of(running, range(2)) == {HANG}
    assert re.search(
        r"hangs in loop_for_ever .*: not all stacks could be written: .*exists\n", running.printed()
    )
    assert running.printed().count("\n") == 1


def test_a_rank_that_dies_while_others_are_slow_is_still_a_death(job, tmp_path):
    running = start(job, tmp_path, 2, 1)
    running.kill(1)
    codes, printed = running.end()
    assert codes == [ENDED, KILLED] and "died without a message" in printed


class StopsAndGoes:
    """Works for longer than any limit, and makes progress; then ends in order."""

    def __init__(self, hang_watch):
        self.marks = hang_watch.marks

    def __call__(self, liveness, rank, folder):
        (folder / f"works-{rank}").touch()
        for step in range(20):
            self.marks("work" if step % 2 else "long work", step)
            time.sleep(0.5)
        liveness.close()


def test_a_job_that_is_stopped_and_continued_as_a_whole_goes_on(job, tmp_path):
    hang_watch = watch(tmp_path)
    running = job(3, StopsAndGoes(hang_watch), hang_watch=hang_watch)
    wait_for(lambda: len(list(tmp_path.glob("works-*"))) == 3)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in range(3):
            running.signal(rank, number)
        time.sleep(2 * SILENT_SECONDS if number == signal.SIGSTOP else 0)
    codes, printed = running.end(within_seconds=60)
    assert codes == [FINISHED] * 3 and printed == ""


class LeavesEarly:
    """Rank 1 says goodbye; the others do so when it would have been missed."""

    def __init__(self, hang_watch):
        self.marks = hang_watch.marks

    def __call__(self, liveness, rank, folder):
        os.environ["PATH"] = ""
        self.marks("long work")
        time.sleep(1.5 if rank == 1 else 4 + SILENT_SECONDS + REPORT_SECONDS)
        liveness.close()


def test_a_rank_that_left_is_not_missed(job, tmp_path):
    hang_watch = watch(tmp_path)
    codes, printed = job(3, LeavesEarly(hang_watch), hang_watch=hang_watch).end(within_seconds=60)
    assert codes == [FINISHED] * 3 and printed == ""


class StayStopped:
    """Whoever is stopped for longer than any limit, in a job that watches for nothing."""

    def __call__(self, liveness, rank, folder):
        (folder / f"works-{rank}").touch()
        time.sleep(SILENT_SECONDS + STAY_SECONDS)
        liveness.close()


def test_without_limits_nothing_hangs(job, tmp_path):
    off = HangWatch(Marks("start"), {"start": Limit(float("inf"), "", float("inf"), "")}, tmp_path / "stacks")
    running = job(2, StayStopped(), hang_watch=off)
    wait_for(lambda: len(list(tmp_path.glob("works-*"))) == 2)
    running.signal(1, signal.SIGSTOP)
    time.sleep(SILENT_SECONDS + STAY_SECONDS)
    running.signal(1, signal.SIGCONT)
    codes, printed = running.end(within_seconds=60)
    assert codes == [FINISHED] * 2 and printed == "" and not (tmp_path / "stacks").exists()
