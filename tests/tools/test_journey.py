"""What journeys through the commands share: how a loss is judged, and how processes end."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools import journey


def losses(first: float, last: float) -> list[float]:
    return [first] * 5 + [last] * journey.LAST_STEPS


def test_the_loss_must_fall_by_more_than_was_promised():
    text = journey.check_loss_fell(losses(7.5, 3.25), 2)
    assert text == "loss 7.50 at step 1, 3.25 in the last 20 steps: 4.25 nats less"
    for last in (5.5, 5.75, 8.0, float("nan")):
        with pytest.raises(journey.JourneyError, match="more than 2 were promised"):
            journey.check_loss_fell(losses(7.5, last), 2)


def test_one_lucky_step_is_no_fall():
    with pytest.raises(journey.JourneyError):
        journey.check_loss_fell([*losses(7.6, 7.5), 1.0], 2)


def test_an_interrupted_command_leaves_no_process_behind(tmp_path):
    """The launcher's own children end with it."""
    note = tmp_path / "pid"
    inner = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    command = [sys.executable, "-c", outer]
    code = f"import os; from tools import journey; journey.run_and_show({command}, dict(os.environ))"
    waiting = subprocess.Popen([sys.executable, "-c", code], cwd=journey.ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    waiting.send_signal(2)
    assert waiting.wait(timeout=20) != 0
    while is_alive(int(note.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(int(note.read_text()))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_command_reads_a_file_and_is_shown_so(tmp_path, capfd):
    words = tmp_path / "two words"
    words.write_text("hello there\n")
    script = journey.Script(1, 1)
    output = script.run("python -c 'print(input().upper())'", stdin=words)
    assert output == "HELLO THERE\n"
    command, shown = capfd.readouterr().out.splitlines()
    assert command == f"$ python -c 'print(input().upper())' < '{words}'" and shown == "HELLO THERE"


def test_an_output_for_a_program_alone_is_not_shown(capfd):
    assert journey.Script(1, 1).run("python -c 'print(42)'", shows=False) == "42\n"
    assert capfd.readouterr().out == "$ python -c 'print(42)'\n"
