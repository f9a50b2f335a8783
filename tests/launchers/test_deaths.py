"""Ranks that die or fail while they train: the job ends at once, says why, and goes on when started again."""

import re
import time
from pathlib import Path

import numpy as np
import pytest

from megalite.data.gpt_dataset import GPTDataset
from megalite.data.indexed_dataset import IndexedDataset, bin_path
from megalite.data.indexed_writer import IndexedDatasetWriter
from tests.launchers.conftest import NUM_STEPS, Finished
from tests.launchers.jobs import ROOT, Ended, Job, deepspeed, read_rows, untimed, wait_for

MOST_SECONDS = 60  # the promise; it takes about two


def kill_in_training(arguments: list[str], folder: Path, victim: int, step: int) -> tuple[Ended, int, float]:
    """Kill a rank once `step` is recorded anew; the job's end, the rank's process id, the seconds between."""
    rows_before = read_rows(folder / "run")
    reached = lambda row: row["step"] >= step and row not in rows_before  # noqa: E731
    with Job(deepspeed(4, *arguments, f"output_dir={folder}/run"), folder) as job:
        wait_for(lambda: job.ranks(victim), 240, job)
        process = job.ranks(victim)[0]  # found in time: the search may take as long as a step
        wait_for(lambda: any(map(reached, read_rows(folder / "run"))), 240, job)
        process.kill()
        killed_at = time.monotonic()
        end = job.wait(MOST_SECONDS)
        seconds = time.monotonic() - killed_at
        assert job.leftovers() == []
    return end, process.pid, seconds


@pytest.mark.timeout(900)  # four starts of four ranks, where other work may hold the cores
def test_a_run_that_is_killed_twice_ends_each_time_and_continues_bit_for_bit(
    uninterrupted: Finished, tmp_path: Path
):
    for victim, step in ((2, 3), (0, 5)):
        end, killed, seconds = kill_in_training(uninterrupted.arguments, tmp_path, victim, step)
        assert end.returncode != 0 and seconds < MOST_SECONDS
        (line,) = end.errors
        assert re.match(rf"error: rank {victim} \(\S+, pid {killed}\) died without a message", line)
        assert "Traceback" not in end.stderr

    with Job(deepspeed(4, *uninterrupted.arguments, f"output_dir={tmp_path}/run"), tmp_path) as job:
        end = job.wait(240)
    assert (end.returncode, end.errors) == (0, [])
    assert re.search(r"resumed from \S+/step-0000000[4-7]\b", end.stdout)

    rows, expected = read_rows(tmp_path / "run"), read_rows(uninterrupted.folder)
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    assert [untimed(row) for row in rows] == [untimed(row) for row in expected]


def test_a_rank_that_fails_is_named_with_its_reason(tmp_path: Path):
    """Ids outside the vocabulary, written into the file of a run that reads it, where only rank 1 reads."""
    seq_length, batch, num_steps = 128, 16, 200
    prefix = str(tmp_path / "numbers")
    with IndexedDatasetWriter(prefix, np.dtype("<u2")) as writer:
        writer.add_document([np.arange(seq_length * batch * num_steps + 1) % 100])
    arguments = [
        "--deepspeed_config",
        str(ROOT / "configs/deepspeed/zero1.json"),
        f"data.train={prefix}",
        "data.split=1,0,0",
        f"schedule.num_steps={num_steps}",
        "logging.validate_every_steps=0",
        "model.num_hidden_layers=1",
        f"output_dir={tmp_path}/run",
    ]
    with Job(deepspeed(2, *arguments), tmp_path) as job:
        wait_for(lambda: read_rows(tmp_path / "run"), 240, job)
        spoil_samples_of_rank_1(prefix, seq_length, batch, num_steps)
        end = job.wait(MOST_SECONDS)
        assert job.leftovers() == []
    assert end.returncode != 0
    (line,) = end.errors
    assert re.match(r"error: rank 1 \(\S+, pid \d+\): sample \d+: token id: .* found 999", line)
    assert "Traceback" not in end.stderr


def spoil_samples_of_rank_1(prefix: str, seq_length: int, batch: int, num_steps: int) -> None:
    """Put an unknown id in the middle of every sample that the second of two data-parallel ranks reads."""
    samples = GPTDataset(IndexedDataset(prefix), seq_length, batch * num_steps, seed=1234)
    positions = np.arange(batch * num_steps)
    of_rank_1 = samples.index.shuffle[positions[positions % batch >= batch // 2]].astype(np.int64)
    tokens = np.memmap(bin_path(prefix), "<u2", mode="r+")
    tokens[of_rank_1 * seq_length + seq_length // 2] = 999
    tokens.flush()
