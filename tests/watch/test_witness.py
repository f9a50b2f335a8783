"""What one rank says of itself, in one process."""

import faulthandler
import os
import signal
import threading
import time

import pytest

from megalite.watch import stacks
from megalite.watch.limits import Limit
from megalite.watch.marks import Marks
from megalite.watch.witness import HangWatch, Witness

SILENT_SECONDS = 3.0


@pytest.fixture
def witness(tmp_path, monkeypatch):
    monkeypatch.setattr(stacks, "DEBUGGERS", ())
    limits = {"work": Limit(60.0, "step", SILENT_SECONDS, "silent")}
    yield Witness(1, 2, HangWatch(Marks("work"), limits, tmp_path / "stacks", waits_in=(":waits",)))
    faulthandler.unregister(stacks.DUMP_SIGNAL)


def waits(event):
    event.wait(30)


def asked_in_another_thread(witness, main):
    """The report that a thread gets while the main thread is in main(event)."""
    found, done = [], threading.Event()

    def ask():
        time.sleep(0.3)
        found.append(witness.report())
        done.set()

    threading.Thread(target=ask).start()
    main(done)
    return found[0]


def test_a_report_tells_what_the_main_thread_does_and_whether_it_waits_for_others(witness):
    report = asked_in_another_thread(witness, waits)
    assert report["waits"] and report["mark"] == [0, "work", None]
    assert report["frame"].startswith("wait (threading.py:")

    busy = asked_in_another_thread(witness, lambda done: done.wait(30))
    assert not busy["waits"]


def test_rank_0_is_missed_after_its_limit_and_later_where_a_debugger_may_hold_it(witness):
    assert witness.misses_rank_0(SILENT_SECONDS) is None
    assert "at most 3.0 expected (silent)" in witness.misses_rank_0(SILENT_SECONDS + 0.1)
    assert witness.write({}) == {}
    assert witness.misses_rank_0(SILENT_SECONDS + 0.1) is None
    assert witness.misses_rank_0(SILENT_SECONDS + stacks.WRITE_SECONDS + 0.1) is not None


def test_no_signal_goes_to_a_process_that_is_not_the_one_that_is_meant(witness, tmp_path, monkeypatch):
    """Its number may be another's by now, which SIGUSR2 would end."""
    sent = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    other_file = os.open(tmp_path / "other", os.O_CREAT)
    strangers = {"node": witness.process.node, "pid": os.getpid()}
    for dump_fd in (other_file, -1, 987):
        state = witness.write({"0": strangers | {"dump_fd": dump_fd}})["0"]
        assert state == stacks.BUSY and sent == []
    witness.write({"0": witness.process.as_message()})
    assert sent == [(os.getpid(), signal.SIGUSR2)]
    os.close(other_file)


def test_a_debugger_that_takes_too_long_is_ended_and_said(witness, tmp_path, monkeypatch):
    monkeypatch.setattr(stacks, "DEBUGGERS", (("missing-debugger",), ("sleep", "60")))
    monkeypatch.setattr(stacks, "NATIVE_SECONDS", 0.2)
    started = time.monotonic()
    assert witness.write({}) == {}
    assert time.monotonic() - started < 30
    text = (tmp_path / "stacks" / "rank-00001.txt").read_text()
    assert text.startswith("rank 1 at work\n") and text.endswith("sleep took more than 0.2 seconds\n")
