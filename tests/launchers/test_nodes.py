"""Several nodes without Slurm: deepspeed over ssh, and torchrun on each, against one process."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.launchers.jobs import BIN, PRETRAIN, ROOT, Job, read_rows
from tests.launchers.nodes import NODES, on_nodes
from tests.packages import UnavailableError
from tests.ports import reserve_port

SECONDS = 300  # of two ranks, where other work holds the cores
pytestmark = pytest.mark.timeout(3 * SECONDS)


@pytest.fixture(scope="module")
def arguments(prefix: str) -> list[str]:
    """Of a tiny run."""
    return [
        *("--deepspeed_config", str(ROOT / "configs/deepspeed/zero3.json")),
        "model={vocab_size: 257, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2}",
        "model.num_attention_heads=4",
        "model.num_key_value_heads=2",
        f"data={{train: {prefix}, seq_length: 32}}",
        "schedule={num_steps: 3, warmup_steps: 1}",
        "logging={validate_every_steps: 0, tensorboard: false}",
        "checkpoint.save_at_end=false",
    ]


@pytest.fixture(scope="module")
def alone(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    """Losses and norms of one process."""
    folder = tmp_path_factory.mktemp("alone")
    with Job(["python", PRETRAIN, *arguments, "output_dir=run"], folder) as job:
        assert job.wait(SECONDS).returncode == 0
    return numbers_of(folder / "run")


def numbers_of(run_dir: Path) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in read_rows(run_dir)]


def check(run_dir: Path, alone: list[tuple[float, float]]) -> None:
    """fp32 sums in another order, over three steps."""
    found = numbers_of(run_dir)
    assert len({loss for loss, _ in alone}) == 3 and len(found) == 3  # a loss that never moves would be equal
    for row, expected in zip(found, alone, strict=True):
        assert row == pytest.approx(expected, rel=1e-4)


def test_deepspeed_reaches_its_nodes_over_ssh(
    arguments: list[str], alone: list[tuple[float, float]], tmp_path: Path
):
    port = str(reserve_port())
    command = ["deepspeed", "--hostfile", "hostfile", "--master_addr", NODES[0], "--master_port", port]
    command += [PRETRAIN, *arguments, "parallel.tp_size=2", "output_dir=run"]
    try:
        inside = on_nodes(tmp_path, ROOT / ".cache" / "ssh", *command)
    except UnavailableError as reason:
        pytest.skip(str(reason))
    home = tmp_path / "home"
    (home / "hostfile").write_text("".join(f"{node} slots=1\n" for node in NODES))
    (home / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    with Job(inside, tmp_path) as job:
        end = job.wait(SECONDS)
    assert end.returncode == 0, end.stdout + end.stderr
    assert "pdsh" in end.stdout + end.stderr and "2 ranks = tensor 2" in end.stdout
    assert all(f"{node}: " in end.stdout for node in NODES)  # pdsh names the host of each line
    check(home / "run", alone)


def test_torchrun_is_started_on_each_node(
    arguments: list[str], alone: list[tuple[float, float]], tmp_path: Path
):
    rendezvous = [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"localhost:{reserve_port()}",
        "--rdzv-id",
        "first",
    ]
    command = [
        str(BIN / "torchrun"),
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--max-restarts",
        "0",
        *rendezvous,
    ]
    command += [PRETRAIN, *arguments, "parallel.tp_size=2", "output_dir=run"]
    with ExitStack() as stack:
        jobs = [stack.enter_context(Job(command, tmp_path)) for _ in NODES]
        ends = [job.wait(SECONDS) for job in jobs]
    assert [(end.returncode, end.errors) for end in ends] == [(0, [])] * 2
    assert sum("2 ranks = tensor 2" in end.stdout for end in ends) == 1
    check(tmp_path / "run", alone)
