"""slurm/submit.sh under a real Slurm: a job runs what was submitted, whatever becomes of the checkout."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.test_pretrain_script import REPOSITORY, SHOW_CHECK, SHOW_RANK, TWO_BY_ONE, read_ranks

TOPS = ("megalite", "slurm", "configs")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of ours with stand-ins for launcher and preflight, to be changed at will."""
    root = tmp_path / "checkout"
    for top in TOPS:
        shutil.copytree(REPOSITORY / top, root / top, ignore=shutil.ignore_patterns("__pycache__"))
    for name, source in (("launchers/pretrain.py", SHOW_RANK), ("tools/preflight.py", SHOW_CHECK)):
        (root / name).parent.mkdir()
        (root / name).write_text(source)
    return root


def submit(cluster: Cluster, checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = ["slurm/submit.sh", *words]
    environment = cluster.environment
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=60)


def job_of(submitted: subprocess.CompletedProcess[str]) -> int:
    assert submitted.returncode == 0, submitted.stderr
    return int(submitted.stdout.split()[-1])


def test_a_job_that_waited_runs_the_code_and_configuration_that_were_submitted(
    cluster: Cluster, checkout: Path
) -> None:
    (checkout / "mine.yaml").write_text("seed: 1\n")
    words = ["../run", "--hold", *TWO_BY_ONE, "slurm/pretrain_460m.sh", "--config", "mine.yaml", "seed=2"]
    job_id = job_of(submit(cluster, checkout, *words))
    for path in ("launchers/pretrain.py", "slurm/pretrain.sh", "mine.yaml"):
        (checkout / path).write_text("exit(9)")
    shutil.rmtree(checkout / "configs")
    cluster.command("scontrol", "release", str(job_id))
    job = cluster.wait(job_id, timeout_seconds=60)
    run_dir = checkout.parent / "run"
    assert (job.state, job.exit_code) == ("COMPLETED", 0), list(run_dir.iterdir())

    code = run_dir / "code"
    ranks = read_ranks(checkout)  # the job starts where it was submitted
    assert len(ranks) == 2
    assert ranks[0]["arguments"] == [
        *("--deepspeed_config", f"{code}/configs/deepspeed/pretrain_460m.json"),
        *("--config", f"{code}/configs/runs/pretrain_460m.yaml"),
        *("stop.after_starts=3", f"output_dir={run_dir}"),
        *("--config", f"{code}/given/mine.yaml", "seed=2"),
    ]
    assert (code / "given" / "mine.yaml").read_text() == "seed: 1\n"
    assert f"{code}/launchers/pretrain.py" in (run_dir / f"pretrain_460m-{job_id}.log").read_text()


def test_the_frozen_package_is_the_one_that_is_imported(cluster: Cluster, checkout: Path) -> None:
    where = "import megalite\nfrom pathlib import Path\nPath('where').write_text(megalite.__file__)\n"
    (checkout / "launchers" / "pretrain.py").write_text(where)
    one = ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0"]
    job_id = job_of(submit(cluster, checkout, "../run", *one, "slurm/pretrain_460m.sh"))
    assert cluster.wait(job_id, timeout_seconds=60).exit_code == 0
    assert (checkout / "where").read_text() == str(checkout.parent / "run/code/megalite/__init__.py")


def test_other_code_under_the_same_run_is_refused_unless_it_is_to_be_replaced(
    cluster: Cluster, checkout: Path
) -> None:
    words = ["../run", "--hold", *TWO_BY_ONE, "slurm/pretrain_460m.sh"]
    jobs = [job_of(submit(cluster, checkout, *words)) for _ in range(2)]  # the same code is no other code
    launcher = checkout / "launchers" / "pretrain.py"
    launcher.write_text("exit(9)")
    refused = submit(cluster, checkout, *words)
    assert refused.returncode == 2 and refused.stdout == "" and refused.stderr.count("\n") == 1
    assert "run/code has other content: Files " in refused.stderr and "--replace" in refused.stderr
    frozen = checkout.parent / "run" / "code" / "launchers" / "pretrain.py"
    assert frozen.read_text() == SHOW_RANK
    jobs.append(job_of(submit(cluster, checkout, "../run", "--replace", *words[1:])))
    assert frozen.read_text() == "exit(9)"
    assert [path.name for path in (checkout.parent / "run").iterdir()] == ["code"]
    cluster.command("scancel", *map(str, jobs))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "RUN_DIR is ''"),
        (["slurm/pretrain_460m.sh"], "RUN_DIR is 'slurm/pretrain_460m.sh'"),
        (["../run", "--nodes", "2", "slurm/pretrain_460m.sh"], "'2' is no script of slurm/"),
        (["../run", "slurm/absent.sh"], "'slurm/absent.sh' is no script of slurm/"),
    ],
)
def test_a_wrong_submission_is_one_line_and_leaves_nothing(
    checkout: Path, words: list[str], complaint: str
) -> None:
    command = ["slurm/submit.sh", *words]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and complaint in done.stderr
    assert not (checkout.parent / "run").exists()
