"""slurm/pretrain.sh, and pretrain_460m.sh that calls it, under a real Slurm: two nodes on this host."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megalite.exit_status import NODE
from tests.ports import reserve_port
from tests.slurm.cluster import Cluster, wait_until

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "slurm" / "pretrain_460m.sh"
ANY_RUN = REPOSITORY / "slurm" / "pretrain.sh"
TWO_BY_TWO = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0"]
TWO_BY_ONE = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0"]

# The shipped run at a size for two CPU cores; it needs all four ranks: tp 2 x dp 2 under ZeRO-3.
TINY_RUN = [
    "model={vocab_size: 257, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2}",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "model.max_position_embeddings=64",
    "model.eos_token_id=null",
    "parallel.tp_size=2",
    "data={train: null, seq_length: 32}",
    "schedule={num_steps: 3, warmup_steps: 1}",
    "logging={log_every_steps: 1, validate_every_steps: 0, tensorboard: false}",
    "checkpoint.save_at_end=false",
]
TINY_DEEPSPEED = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 3},
}

# A stand-in for launchers/pretrain.py that shows what a rank is given, and ends as it is told.
SHOW_RANK = """
import json, os, sys, time
from pathlib import Path
if "--check" in sys.argv:
    sys.exit(0)
names = "RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT SLURMD_NODENAME OMP_NUM_THREADS".split()
seen = {name: os.environ.get(name) for name in names} | {"arguments": sys.argv[1:]}
Path(f"rank-{os.environ['RANK']}.json").write_text(json.dumps(seen))
if "crash_rank_2" in sys.argv:
    if os.environ["RANK"] == "2":
        sys.exit(7)
    time.sleep(300)
"""

# A stand-in for tools/preflight.py that fails as it is told: wrong, or on the node bad_NODE.
SHOW_CHECK = """
import json, os, sys
from pathlib import Path
node = os.environ["SLURMD_NODENAME"]
Path(f"check-{node}-{os.environ['RANK']}.json").write_text(json.dumps(sys.argv[1:]))
if f"bad_{node}" in sys.argv:
    Path(sys.argv[sys.argv.index("--bad-nodes") + 1]).write_text(node + chr(10))
    sys.exit(77)
sys.exit(2 if "wrong" in sys.argv else 0)
"""
START_SECONDS = 300  # of four ranks, checked and then trained, where other work holds the cores
WITHOUT_PREFLIGHT = "--export=ALL,PREFLIGHT=0"


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A checkout whose launcher is SHOW_RANK and whose preflight is SHOW_CHECK.

    It has one more run, which has no DeepSpeed JSON of its own.
    """
    for folder in ("launchers", "tools", "configs/runs"):
        (tmp_path / folder).mkdir(parents=True)
    for path in (
        "slurm",
        "configs/deepspeed",
        "configs/runs/pretrain_460m.yaml",
        "configs/runs/llama3_8b.yaml",
    ):
        (tmp_path / path).symlink_to(REPOSITORY / path)
    (tmp_path / "configs" / "runs" / "mine.yaml").touch()
    for task in ("pretrain", "finetune", "prefer"):
        (tmp_path / "launchers" / f"{task}.py").write_text(SHOW_RANK)
    (tmp_path / "tools" / "preflight.py").write_text(SHOW_CHECK)
    return tmp_path


@pytest.fixture
def deepspeed_config(tmp_path: Path) -> Path:
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(TINY_DEEPSPEED))
    return path


def read_ranks(checkout: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(checkout.glob("rank-*.json"))]


def read_losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_every_rank_learns_its_place_and_the_arguments_from_slurm(cluster: Cluster, stand_in: Path) -> None:
    overrides = ["model.rope_scaling={factor: 8, rope_type: linear}", "schedule.num_steps=10"]
    scattered = (
        "--distribution=cyclic"  # a site's or a user's habit, that would part tensor-parallel neighbours
    )
    job_id = cluster.submit(SCRIPT, *overrides, options=[*TWO_BY_TWO, scattered], cwd=stand_in)
    job = cluster.wait(job_id, timeout_seconds=60)
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.log

    ranks = read_ranks(stand_in)
    assert [rank["RANK"] for rank in ranks] == ["0", "1", "2", "3"]
    assert [rank["LOCAL_RANK"] for rank in ranks] == ["0", "1", "0", "1"]
    assert [rank["SLURMD_NODENAME"] for rank in ranks] == ["n1", "n1", "n2", "n2"]
    assert {rank["WORLD_SIZE"] for rank in ranks} == {"4"}
    assert {rank["MASTER_ADDR"] for rank in ranks} == {"127.0.0.1"}  # the address of n1, a name nobody knows
    assert {rank["MASTER_PORT"] for rank in ranks} == {str(10000 + job_id)}
    for rank in ranks:
        assert rank["arguments"] == [
            *("--deepspeed_config", "configs/deepspeed/pretrain_460m.json"),
            *("--config", "configs/runs/pretrain_460m.yaml"),
            "stop.after_starts=3",
            *overrides,
        ]


@pytest.mark.parametrize(("name", "json_name"), [("llama3_8b", "llama3_8b"), ("mine", "zero3_bf16")])
def test_any_run_is_started_by_its_name(cluster: Cluster, stand_in: Path, name: str, json_name: str) -> None:
    job_id = cluster.submit(ANY_RUN, name, "seed=3", options=TWO_BY_ONE, cwd=stand_in)
    job = cluster.wait(job_id, timeout_seconds=60)
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.log
    for rank in read_ranks(stand_in):
        assert rank["arguments"] == [
            *("--deepspeed_config", f"configs/deepspeed/{json_name}.json"),
            *("--config", f"configs/runs/{name}.yaml"),
            "stop.after_starts=3",
            "seed=3",
        ]


def test_the_log_begins_with_what_runs_where(cluster: Cluster, stand_in: Path) -> None:
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost"]
    subprocess.run([*git, "init", "-q"], cwd=stand_in, check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], cwd=stand_in, check=True)
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=stand_in, text=True).strip()
    job_id = cluster.submit(SCRIPT, "seed=1", options=TWO_BY_TWO, cwd=stand_in)
    head = cluster.wait(job_id, timeout_seconds=60).log.splitlines()[:5]
    assert head[0].split() == ["job", str(job_id), "(pretrain_460m)"]
    assert "n[1-2] (2 nodes, 4 tasks" in head[1]
    assert commit in head[3]
    assert "configs/runs/pretrain_460m.yaml" in head[4] and head[4].endswith("seed=1")


def test_the_same_file_runs_inside_salloc(cluster: Cluster, stand_in: Path) -> None:
    cluster.command("salloc", "--quiet", *TWO_BY_TWO, str(SCRIPT), "seed=2", cwd=stand_in)
    ranks = read_ranks(stand_in)
    assert [rank["RANK"] for rank in ranks] == ["0", "1", "2", "3"]
    assert all(rank["arguments"][-1] == "seed=2" for rank in ranks)


def test_a_crashed_rank_ends_the_job_with_an_error(cluster: Cluster, stand_in: Path) -> None:
    job_id = cluster.submit(SCRIPT, "crash_rank_2", options=[*TWO_BY_TWO, "--no-requeue"], cwd=stand_in)
    job = cluster.wait(job_id, timeout_seconds=60)  # the other ranks would sleep for 300 s
    assert job.state == "FAILED" and job.exit_code != 0, job.log
    assert "Exited with exit code 7" in job.log


@pytest.mark.timeout(3 * START_SECONDS)
def test_a_job_on_two_nodes_trains_exactly_as_under_the_deepspeed_launcher(
    cluster: Cluster, deepspeed_config: Path, tmp_path: Path
) -> None:
    under_slurm = ["--deepspeed_config", str(deepspeed_config), *TINY_RUN, f"output_dir={tmp_path}/slurm"]
    job_id = cluster.submit(SCRIPT, *under_slurm, options=TWO_BY_TWO, cwd=REPOSITORY)
    job = cluster.wait(job_id, timeout_seconds=START_SECONDS)
    assert job.exit_code == 0, job.log

    assert "preflight: all is well" in job.log and re.search(r"^dp +4 ", job.log, flags=re.M), job.log
    run_with_deepspeed(deepspeed_config, f"output_dir={tmp_path}/deepspeed")
    losses = read_losses(tmp_path / "slurm")
    assert len(set(losses)) == 3  # a loss that never moves would be equal, too
    assert losses == read_losses(tmp_path / "deepspeed")


def run_with_deepspeed(deepspeed_config: Path, *overrides: str, num_ranks: int = 4) -> None:
    """The same run on one node, started by the deepspeed launcher."""
    launcher = [str(Path(sys.executable).with_name("deepspeed")), f"--num_gpus={num_ranks}"]
    launcher += [f"--master_port={reserve_port()}"]
    program = ["launchers/pretrain.py", "--deepspeed_config", str(deepspeed_config)]
    run = ["--config", "configs/runs/pretrain_460m.yaml", *TINY_RUN, *overrides]
    done = subprocess.run(
        [*launcher, *program, *run],
        cwd=REPOSITORY,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=2 * START_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_override_ends_the_job_with_one_clear_line(cluster: Cluster, deepspeed_config: Path) -> None:
    arguments = ["--deepspeed_config", str(deepspeed_config), *TINY_RUN, "schedule.num_stepz=3"]
    job_id = cluster.submit(SCRIPT, *arguments, options=TWO_BY_TWO, cwd=REPOSITORY)
    job = cluster.wait(job_id, timeout_seconds=60)
    assert job.state == "FAILED" and job.exit_code != 0
    assert "Traceback" not in job.log
    said = job.log.splitlines()
    assert said[-1].startswith("error: ") and "schedule.num_stepz" in said[-1], job.log
    assert job.exit_code == 2 and "queued again" not in job.log and "srun" not in job.log


def test_a_killed_rank_ends_a_training_job_within_a_minute(
    cluster: Cluster, deepspeed_config: Path, tmp_path: Path
) -> None:
    endless = ["schedule.num_steps=100000", f"output_dir={tmp_path}/run"]
    arguments = ["--deepspeed_config", str(deepspeed_config), *TINY_RUN, *endless]
    job_id = cluster.submit(
        SCRIPT, *arguments, options=[*TWO_BY_ONE, "--no-requeue", WITHOUT_PREFLIGHT], cwd=REPOSITORY
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() or cluster.is_finished(job_id), 60, what="first step")
    assert metrics.exists(), cluster.log(job_id)
    os.kill(cluster.ranks(job_id)[1], signal.SIGKILL)
    job = cluster.wait(job_id, timeout_seconds=60)
    assert job.state == "FAILED" and job.exit_code != 0, job.log
    assert "task 1: Killed" in job.log


def test_a_node_that_fails_the_preflight_is_named_and_left_out(cluster: Cluster, stand_in: Path) -> None:
    one_node = ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0"]
    job_id = cluster.submit(SCRIPT, "bad_n1", options=one_node, cwd=stand_in)
    job = cluster.wait(job_id, timeout_seconds=120)
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.log
    assert "status 77: queued again, without n1" in job.log and job.log.rstrip().endswith("finished")
    assert [rank["SLURMD_NODENAME"] for rank in read_ranks(stand_in)] == ["n2"]
    assert not list(stand_in.glob(".preflight-*"))


def test_a_node_that_cannot_be_left_out_ends_the_job_with_77(cluster: Cluster, stand_in: Path) -> None:
    job_id = cluster.submit(SCRIPT, "bad_n2", options=[*TWO_BY_ONE, "--no-requeue"], cwd=stand_in)
    job = cluster.wait(job_id, timeout_seconds=60)
    assert (job.state, job.exit_code) == ("FAILED", NODE), job.log
    assert "status 77: the preflight failed on n2; nothing was trained" in job.log
    assert read_ranks(stand_in) == []


def test_the_preflight_is_given_the_nodes_and_what_the_launcher_is_given(
    cluster: Cluster, stand_in: Path
) -> None:
    job_id = cluster.submit(SCRIPT, "wrong", options=TWO_BY_ONE, cwd=stand_in)
    job = cluster.wait(job_id, timeout_seconds=60)
    assert (job.state, job.exit_code) == ("FAILED", 2), job.log
    assert read_ranks(stand_in) == []
    checks = [json.loads(path.read_text()) for path in sorted(stand_in.glob("check-*.json"))]
    assert len(checks) == 2 and checks[0] == checks[1]
    assert checks[0][:5] == ["--task", "pretrain", "--nodes", "n1,n2", "--bad-nodes"]
    assert checks[0][6:] == [
        *("--deepspeed_config", "configs/deepspeed/pretrain_460m.json"),
        *("--config", "configs/runs/pretrain_460m.yaml"),
        *("stop.after_starts=3", "wrong"),
    ]


IN_A_JOB = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    ("script", "cwd", "job", "complaint"),
    [
        (ANY_RUN, REPOSITORY, {}, "not in a Slurm job"),
        (ANY_RUN, REPOSITORY, {"SLURM_JOB_ID": "1"}, "give --ntasks-per-node"),
        (ANY_RUN, Path("/"), IN_A_JOB, "submit from the root of the checkout"),
        (SCRIPT, Path("/"), IN_A_JOB, "submit from the root of the checkout"),
    ],
)
def test_started_in_the_wrong_place_it_says_what_to_do(
    script: Path, cwd: Path, job: dict[str, str], complaint: str
) -> None:
    assert complaint in complaint_of(script, cwd=cwd, job=job)


@pytest.mark.parametrize("arguments", [[], ["absent"], ["seed=1"], ["--config", "other.yaml"]])
def test_without_a_known_name_it_lists_those_that_are_known(stand_in: Path, arguments: list[str]) -> None:
    said = complaint_of(ANY_RUN, *arguments, cwd=stand_in, job=IN_A_JOB)
    assert "give one of llama3_8b mine pretrain_460m as the first argument" in said
    assert f"CONFIG '{arguments[0] if arguments else ''}'" in said


def run_beside_stand_ins(script: Path, *arguments: str, cwd: Path) -> str:
    """What the script prints in a job whose srun shows its words, and whose scontrol knows one node."""
    commands = cwd / "commands"
    commands.mkdir()
    for name, body in (("srun", 'echo "srun $*"'), ("scontrol", 'echo "n1 NodeAddr=127.0.0.1 "')):
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    job = IN_A_JOB | {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_CPUS_PER_NODE": "4(x2)", "SLURM_JOB_NAME": "x"}
    job |= {"SLURM_JOB_NODELIST": "n[1-2]", "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([script, *arguments], cwd=cwd, env=os.environ | job, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("run", "launcher"),
    [
        ("", "pretrain"),
        ("seed: 3\n", "pretrain"),
        ("task: pretrain\n", "pretrain"),
        ("# task: prefer\ntask: finetune  # on conversations\n", "finetune"),
        ("data:\n  task: 1\ntask: prefer\n", "prefer"),
    ],
)
def test_the_task_of_a_run_names_its_launcher(stand_in: Path, run: str, launcher: str) -> None:
    (stand_in / "configs/runs/mine.yaml").write_text(run)
    lines = run_beside_stand_ins(ANY_RUN, "mine", "seed=3", cwd=stand_in).splitlines()
    check, training = [line for line in lines if line.startswith("srun ")]
    assert f" tools/preflight.py --task {launcher} " in check
    assert f" launchers/{launcher}.py --deepspeed_config " in training
    for shown in (check, training):
        assert shown.endswith("--config configs/runs/mine.yaml stop.after_starts=3 seed=3")


def complaint_of(script: Path, *arguments: str, cwd: Path, job: dict[str, str]) -> str:
    """The one line with which a script refuses to start."""
    outside = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    command = [script, *arguments]
    done = subprocess.run(command, cwd=cwd, env=outside | job, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr
