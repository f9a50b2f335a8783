"""A run that is asked to stop saves, ends with its own status, and goes on as if nothing had been."""

import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megalite.checkpoint.format import list_steps
from megalite.exit_status import FINISHED, STOPPED
from tests.launchers.conftest import NUM_STEPS, Finished
from tests.launchers.jobs import Ended, Job, deepspeed, read_rows, untimed, wait_for

MOST_SECONDS = 120


def stop_at(arguments: list[str], folder: Path, step: int, ask: Callable[[Job], object]) -> Ended:
    """Start, or go on, and ask for a stop once a step is recorded; how it ended."""
    with Job(deepspeed(4, *arguments, f"output_dir={folder}/run"), folder) as job:
        wait_for(lambda: any(row["step"] >= step for row in read_rows(folder / "run")), 240, job)
        ask(job)
        end = job.wait(MOST_SECONDS)
        assert job.leftovers() == []
    assert (end.returncode, end.errors) == (STOPPED, []), end
    saved, recorded = list_steps(folder / "run/checkpoints"), read_rows(folder / "run")
    assert saved[-1] == recorded[-1]["step"] < NUM_STEPS
    return end


@pytest.mark.timeout(900)  # four starts of four ranks, where other work may hold the cores
def test_a_run_that_is_stopped_thrice_saves_and_continues_bit_for_bit(
    uninterrupted: Finished, tmp_path: Path
):
    arguments = [*uninterrupted.arguments, "checkpoint.save_every_steps=0"]
    asks = {
        "SIGTERM (rank 2)": lambda job: job.ranks(2)[0].send_signal(signal.SIGTERM),
        "SIGUSR1 (rank 1)": lambda job: job.ranks(1)[0].send_signal(signal.SIGUSR1),
        "the file 'stop' (rank 0)": lambda job: (tmp_path / "run/stop").touch(),
    }
    for number, (reason, ask) in enumerate(asks.items()):
        end = stop_at(arguments, tmp_path, 1 + 2 * number, ask)
        assert f"stopped by {reason}, and saved: the same command continues" in end.stderr
    with Job(deepspeed(4, *arguments, f"output_dir={tmp_path}/run"), tmp_path) as job:
        end = job.wait(240)
    assert (end.returncode, end.errors) == (FINISHED, [])
    assert re.search(r"resumed from \S+/step-0000000[5-7]\b", end.stdout)

    rows, expected = read_rows(tmp_path / "run"), read_rows(uninterrupted.folder)
    assert [untimed(row) for row in rows] == [untimed(row) for row in expected]
