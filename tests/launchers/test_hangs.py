"""Ranks that stop or get stuck while they train: the job ends, and says which rank, step and place.

Other work on the machine makes steps longer, and the limit with them, which is learnt; it is never too short:
a step of this model takes a tenth of a second, a hundredth of the limit.
"""

import os
import re
import shutil
import time
from pathlib import Path

import pytest

from megalite.exit_status import HANG
from megalite.watch.stacks import DEBUGGERS
from tests.launchers import stuck
from tests.launchers.jobs import ROOT, Ended, Job, deepspeed, read_rows, wait_for

STEP_SECONDS, STOPPED_SECONDS = 10, 10
HEARD_SECONDS = (
    5  # in which rank 0 has heard of each rank that it is beyond its first step, which may be silent
)
NOTICE_SECONDS = 420  # for the limit, which is learnt, and two debuggers where other work holds the cores
LAUNCHER_SECONDS = 90  # DeepSpeed's launcher gives each rank half a minute to end


def arguments(folder: Path, prefix: str) -> list[str]:
    return [
        "--deepspeed_config",
        str(ROOT / "configs/deepspeed/zero1.json"),
        f"data.train={prefix}",
        "model.num_hidden_layers=1",
        "schedule.num_steps=10000",
        "logging.validate_every_steps=0",
        f"checkpoint.save_every_steps={stuck.SAVED_STEP}",
        f"watch.step_seconds={STEP_SECONDS}",
        f"watch.stopped_seconds={STOPPED_SECONDS}",
        f"output_dir={folder}/run",
    ]


def end_of(job: Job) -> Ended:
    """Wait for the line, then for the end."""
    wait_for(lambda: "error: " in job.logs[1].read_text(), NOTICE_SECONDS, job)
    end = job.wait(LAUNCHER_SECONDS)
    assert job.leftovers() == []
    assert end.returncode == HANG
    assert "Traceback" not in end.stderr
    return end


def stacks(folder: Path, rank: int) -> str:
    return (folder / "run" / "stacks" / f"rank-{rank:05d}.txt").read_text()


@pytest.mark.timeout(900)
def test_a_rank_that_is_stopped_is_named_and_the_others_show_where_they_wait(prefix: str, tmp_path: Path):
    with Job(deepspeed(2, *arguments(tmp_path, prefix)), tmp_path) as job:
        wait_for(lambda: len(read_rows(tmp_path / "run")) > 3, 240, job)
        time.sleep(HEARD_SECONDS)
        victim = job.ranks(1)[0]
        victim.suspend()
        (line,) = end_of(job).errors
    rows = len(read_rows(tmp_path / "run"))
    expected = (
        rf"error: rank 1 \(\S+, pid {victim.pid}\) is stopped \(SIGSTOP\) at step (\d+), [a-z ]+: no sign of "
        rf"life for \S+ seconds, at most {STOPPED_SECONDS}.0 expected \(watch.stopped_seconds\): the stacks "
        rf"of all ranks are in {tmp_path}/run/stacks"
    )
    named = re.fullmatch(expected, line)
    assert named and 0 <= rows + 1 - int(named[1]) <= 20 * STOPPED_SECONDS  # it was heard of a second before
    python, _, native = stacks(tmp_path, 0).partition("\nNative")
    assert "torch/distributed" in python and "train_step" in python
    if any(shutil.which(command[0]) for command in DEBUGGERS):
        assert "gloo::" in native
    assert "wchan: do_signal_stop" in stacks(tmp_path, 1)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("place", "reached", "frame"),
    [("reading", "reading data", "read_pipe"), ("computing", "forward and backward", "loop")],
)
def test_a_rank_that_is_stuck_is_named_after_a_slow_save_that_is_no_hang(
    prefix: str, tmp_path: Path, place: str, reached: str, frame: str
):
    os.mkfifo(tmp_path / stuck.PIPE)
    assert stuck.SLOW_SAVE_SECONDS > 2 * STEP_SECONDS
    command = deepspeed(2, place, *arguments(tmp_path, prefix), script=stuck.__file__)
    with Job(command, tmp_path) as job:
        wait_for(lambda: read_rows(tmp_path / "run"), 240, job)
        (line,) = end_of(job).errors
    step = stuck.STUCK_STEP
    where = f"at step {step}, {reached}: no progress"
    assert re.match(rf"error: rank 1 \(\S+, pid \d+\) hangs in .* {where}", line)
    assert "watch.step_seconds" in line
    assert frame in stacks(tmp_path, 1)
    assert "torch/distributed" in stacks(tmp_path, 0)
    assert [row["step"] for row in read_rows(tmp_path / "run")] == list(range(1, step))
