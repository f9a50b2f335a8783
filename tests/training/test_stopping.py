"""Requests to stop or save, which one rank gets and all agree on."""

import os
import signal
import time

import pytest
import torch

from megalite.training import stopping as module
from megalite.training.stopping import Request, Signals, Stopping
from tests.harness import run_distributed

CPU = torch.device("cpu")


def agree_on_everything(rank, folder):
    """What three ranks agree on, one situation after the other."""
    signals = Signals()
    stopping = Stopping(folder, None, signals, CPU, time.monotonic())
    found = {"nothing": stopping.agree()}
    found["failed save"] = stopping.agree("a checkpoint that was not saved" if rank == 2 else None)
    if rank == 0:
        (folder / "save").touch()
    found["save"], found["save again"] = stopping.agree(), stopping.agree()
    if rank == 0:
        (folder / "stop").touch()
    found["stop"], found["stop again"] = stopping.agree(), stopping.agree()
    late = Stopping(folder, 0.5, signals, CPU, time.monotonic() - 29)
    found["early"] = late.agree()
    late = Stopping(folder, 0.5, signals, CPU, time.monotonic() - 31)
    found["late"] = late.agree()
    if rank == 1:
        signal.raise_signal(signal.SIGUSR1)
    found["signal"] = stopping.agree()
    if rank == 2:
        signal.raise_signal(signal.SIGTERM)
    found["two signals"], found["still"] = late.agree(), late.agree()
    return found


def test_all_ranks_agree(tmp_path):
    everyone = run_distributed(agree_on_everything, 3, tmp_path)
    assert everyone[0] == everyone[1] == everyone[2]
    assert everyone[0] == {
        "nothing": None,
        "failed save": Request("a checkpoint that was not saved", 2),
        "save": Request("the file 'save'", 0),
        "save again": None,
        "stop": Request("the file 'stop'", 0),
        "stop again": None,
        "early": None,
        "late": Request("stop.after_minutes", 0),
        "signal": Request("SIGUSR1", 1),
        "two signals": Request("SIGTERM", 2),
        "still": Request("SIGTERM", 2),
    }
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("reason", "saves", "stops"),
    [
        ("a checkpoint that was not saved", False, False),
        ("the file 'save'", True, False),
        ("the file 'stop'", True, True),
        ("stop.after_minutes", True, True),
        ("SIGTERM", True, True),
        ("SIGINT", True, True),
        ("SIGUSR1", True, True),
    ],
)
def test_what_is_asked_for(reason, saves, stops):
    request = Request(reason, 0)
    assert (request.saves, request.stops) == (saves, stops)
    assert reason in module.REASONS


def in_a_child(body):
    """How a forked process that runs the body ends: its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        body()
        os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_second_signal_ends_the_process_at_once_and_an_echo_does_not(monkeypatch):
    def twice():
        Signals()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # as a launcher's, after the terminal's own
        module.ECHO_SECONDS = 0.05
        time.sleep(0.1)
        signal.raise_signal(signal.SIGINT)

    def echo():
        Signals()
        for number in module.SIGNALS:
            signal.raise_signal(number)

    def ignored():
        Signals().ignore()
        module.ECHO_SECONDS = 0.0
        for number in module.SIGNALS * 2:
            signal.raise_signal(number)
            time.sleep(0.01)

    assert in_a_child(twice) == 128 + signal.SIGINT
    assert in_a_child(echo) == 99
    assert in_a_child(ignored) == 99


def test_what_a_rank_forks_ends_by_signals_as_usual():
    def fork_again():
        Signals()
        status = in_a_child(lambda: signal.raise_signal(signal.SIGTERM))
        os._exit(0 if status == -signal.SIGTERM else 1)

    assert in_a_child(fork_again) == 0
