"""The life of a job under a real Slurm: warned, killed, queued again, resumed, and given up in the end."""

import json
import os
import signal
from pathlib import Path

import pytest

from megalite.checkpoint.format import list_steps
from megalite.exit_status import MISTAKE, NO_PROGRESS
from tests.launchers.jobs import read_rows
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.test_pretrain_script import (
    REPOSITORY,
    SCRIPT,
    TINY_DEEPSPEED,
    TINY_RUN,
    TWO_BY_ONE,
    WITHOUT_PREFLIGHT,
    run_with_deepspeed,
)

NUM_STEPS, FEW_STEPS = 100, 30
SOME_STEPS = 5
# The partition's limit is 10 minutes.
LIMITED = [*TWO_BY_ONE, "--signal=B:USR1@30", WITHOUT_PREFLIGHT]
START_SECONDS = 240  # of two ranks, where other work holds the cores
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Of a run that saves only when it is asked to, and at its end."""
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(TINY_DEEPSPEED))
    run = [override for override in TINY_RUN if not override.startswith(("schedule", "checkpoint"))]
    return [
        *("--deepspeed_config", str(file), *run),
        f"schedule={{num_steps: {NUM_STEPS}, warmup_steps: 1}}",
        "checkpoint={save_every_steps: 0}",
    ]


def wait_for_step(cluster: Cluster, job_id: int, run_dir: Path, step: int) -> None:
    reached = lambda: any(row["step"] >= step for row in read_rows(run_dir))  # noqa: E731
    wait_until(lambda: reached() or cluster.is_finished(job_id), START_SECONDS, what=f"step {step}")
    assert reached(), cluster.log(job_id)


def test_a_job_that_is_warned_and_then_killed_ends_as_if_nothing_had_been(
    cluster: Cluster, arguments: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "slurm"
    job_id = cluster.submit(SCRIPT, *arguments, f"output_dir={run_dir}", options=LIMITED, cwd=REPOSITORY)
    wait_for_step(cluster, job_id, run_dir, SOME_STEPS)
    cluster.command("scancel", "--batch", "--signal=USR1", str(job_id))  # as the time limit's warning comes
    wait_until(lambda: list_steps(run_dir / "checkpoints") != [], 60, what="a checkpoint")
    saved = list_steps(run_dir / "checkpoints")[-1]
    assert SOME_STEPS <= saved < NUM_STEPS

    again = f"step {saved + SOME_STEPS}/{NUM_STEPS} |"  # a line of the log, once per start that comes so far
    before = cluster.log(job_id).count(again)
    wait_until(lambda: cluster.log(job_id).count(again) > before, START_SECONDS, what="another start")
    os.kill(cluster.ranks(job_id)[1], signal.SIGKILL)

    wait_until(lambda: cluster.log(job_id).count(again) > before + 1, START_SECONDS, what="a third start")
    cluster.command("scontrol", "requeue", str(job_id))  # ranks get SIGTERM, and some time to save

    job = cluster.wait(job_id, timeout_seconds=2 * START_SECONDS)
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.log
    assert "stopped by SIGUSR1" in job.log and "status 75: queued again" in job.log
    assert ", start 4" in job.log and job.log.rstrip().endswith("finished")
    assert job.log.count("resumed from ") == 3
    assert job.log.count(f"resumed from {run_dir}/checkpoints/step-{saved:08d}") >= 2

    assert numbers_of(run_dir) == undisturbed(arguments, tmp_path)
    assert len(numbers_of(run_dir)) == NUM_STEPS


def test_a_job_that_loses_a_node_goes_on_when_it_is_back(
    cluster: Cluster, arguments: list[str], tmp_path: Path
) -> None:
    """The controller notices, not the script: it marks the node down and queues the job again."""
    run_dir, arguments = tmp_path / "slurm", [*arguments, f"schedule.num_steps={FEW_STEPS}"]
    job_id = cluster.submit(SCRIPT, *arguments, f"output_dir={run_dir}", options=LIMITED, cwd=REPOSITORY)
    wait_for_step(cluster, job_id, run_dir, SOME_STEPS)
    (run_dir / "save").touch()
    wait_until(lambda: list_steps(run_dir / "checkpoints") != [], 60, what="a checkpoint")
    saved = list_steps(run_dir / "checkpoints")[-1]
    wait_for_step(cluster, job_id, run_dir, saved + 1)
    cluster.lose_node("n2")
    try:
        lost = lambda: cluster.state_of_node("n2").startswith("down")  # noqa: E731
        wait_until(lost, 120, what="the controller to miss the node")
        assert saved < read_rows(run_dir)[-1]["step"] < FEW_STEPS
    finally:
        cluster.return_node("n2")

    job = cluster.wait(job_id, timeout_seconds=2 * START_SECONDS)
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.log
    assert ", start 2" in job.log and ", start 3" not in job.log and job.log.rstrip().endswith("finished")
    assert job.log.count("resumed from ") == 1
    assert f"resumed from {run_dir}/checkpoints/step-{saved:08d}" in job.log
    assert numbers_of(run_dir) == undisturbed(arguments, tmp_path)
    assert len(numbers_of(run_dir)) == FEW_STEPS


def undisturbed(arguments: list[str], folder: Path) -> list[tuple[int, float, float]]:
    """Step, loss and norm of the same run that nothing happens to."""
    run_with_deepspeed(Path(arguments[1]), *arguments[2:], f"output_dir={folder}/deepspeed", num_ranks=2)
    return numbers_of(folder / "deepspeed")


def numbers_of(run_dir: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_rows(run_dir)]


CRASHING_DATA = """
import megalite.data.corpus
def crash(*_, **__):
    raise RuntimeError("data preparation crashed")
megalite.data.corpus.prepare_default_data = crash
"""


def test_a_job_whose_data_preparation_always_crashes_is_given_up(
    cluster: Cluster, arguments: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    (tmp_path / "sitecustomize.py").write_text(CRASHING_DATA)  # which every Python of the job imports
    options = [*LIMITED, f"{WITHOUT_PREFLIGHT},PYTHONPATH={tmp_path}"]
    job_id = cluster.submit(SCRIPT, *arguments, f"output_dir={run_dir}", options=options, cwd=REPOSITORY)
    job = cluster.wait(job_id, timeout_seconds=4 * START_SECONDS)
    assert (job.state, job.exit_code) == ("FAILED", NO_PROGRESS), job.log
    assert "RuntimeError: data preparation crashed" in job.log and ", start 4" in job.log
    assert job.log.count("queued again, to go on") == 3
    assert "error: 3 starts from step 0 have come to no newer checkpoint (stop.after_starts 3)" in job.log


def test_a_job_that_is_cancelled_saves_first(cluster: Cluster, arguments: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job_id = cluster.submit(SCRIPT, *arguments, f"output_dir={run_dir}", options=LIMITED, cwd=REPOSITORY)
    wait_for_step(cluster, job_id, run_dir, SOME_STEPS)
    cluster.command("scancel", str(job_id))
    job = cluster.wait(job_id, timeout_seconds=60)
    assert job.state == "CANCELLED", job.log
    wait_until(lambda: list_steps(run_dir / "checkpoints") != [], 60, what="a checkpoint")
    assert list_steps(run_dir / "checkpoints")[-1] == read_rows(run_dir)[-1]["step"]


def starts_of(run_dir: Path) -> int:
    file = run_dir / "starts.json"
    return json.loads(file.read_text())["starts"] if file.exists() else 0


def test_a_job_that_always_dies_before_it_saves_is_given_up(
    cluster: Cluster, arguments: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job_id = cluster.submit(SCRIPT, *arguments, f"output_dir={run_dir}", options=LIMITED, cwd=REPOSITORY)
    for number in (1, 2, 3):
        wait_until(lambda number=number: starts_of(run_dir) == number, START_SECONDS, what=f"start {number}")
        os.kill(cluster.ranks(job_id)[1], signal.SIGKILL)
    job = cluster.wait(job_id, timeout_seconds=START_SECONDS)
    assert (job.state, job.exit_code) == ("FAILED", NO_PROGRESS), job.log
    assert job.log.count("queued again, to go on") == 3 and ", start 4" in job.log
    assert "error: 3 starts from step 0 have come to no newer checkpoint (stop.after_starts 3)" in job.log
    assert "status 93: not queued again" in job.log


def test_a_mistake_in_the_data_is_not_tried_twice(
    cluster: Cluster, arguments: list[str], tmp_path: Path
) -> None:
    overrides = [f"data.train={tmp_path}/absent", f"output_dir={tmp_path}/run"]
    job_id = cluster.submit(SCRIPT, *arguments, *overrides, options=LIMITED, cwd=REPOSITORY)
    job = cluster.wait(job_id, timeout_seconds=START_SECONDS)
    assert (job.state, job.exit_code) == ("FAILED", MISTAKE), job.log
    assert "status 2: not queued again" in job.log and "Traceback" not in job.log
