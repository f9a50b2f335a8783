"""tools/preflight.py in processes of its own, two ranks on nodes that are called n1 and n2."""

import shutil
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from megalite.exit_status import FINISHED, MISTAKE, NODE
from tests.launchers.jobs import ROOT, Ended, Job
from tests.ports import reserve_port

ZERO3 = str(ROOT / "configs/deepspeed/zero3.json")
pytestmark = pytest.mark.timeout(400)


class Nodes:
    """Starts preflights whose ranks are each alone on a node."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, reserve_port()
        self.arguments = ["--deepspeed_config", ZERO3, "parallel.tp_size=2", f"output_dir={folder}/run"]

    def start(self, rank: int, *words: str, checkout: Path = ROOT) -> Job:
        command = [sys.executable, str(checkout / "tools" / "preflight.py"), *self.arguments, *words]
        numbers = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port)}
        environment = {"SLURMD_NODENAME": f"n{rank + 1}", "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        return Job(command, self.folder, **numbers, **meeting, **environment)

    def both(self, *words: str, checkouts: tuple[Path, Path] = (ROOT, ROOT)) -> list[Ended]:
        with ExitStack() as stack:
            starts = [self.start(rank, *words, checkout=checkouts[rank]) for rank in range(2)]
            jobs = [stack.enter_context(job) for job in starts]
            return [job.wait(150) for job in jobs]


@pytest.fixture
def nodes(tmp_path: Path) -> Nodes:
    return Nodes(tmp_path)


def test_two_sound_nodes_pass(nodes: Nodes) -> None:
    first, second = nodes.both("--bad-nodes", "bad")
    assert (first.returncode, second.returncode) == (FINISHED, FINISHED), first.stderr + second.stderr
    words = [line.split() for line in first.stdout.splitlines()]
    assert [line[0] for line in words] == ["node", "n1", "n2", "all-reduce", "tp", "preflight:"]
    assert second.stdout == "" and first.errors == second.errors == []
    assert not (nodes.folder / "bad").exists()


def test_a_node_with_other_code_is_named(nodes: Nodes) -> None:
    other = nodes.folder / "other"
    for name in ("megalite", "tools"):
        shutil.copytree(ROOT / name, other / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "megalite" / "batch.py").open("a") as file:
        file.write("# another comment\n")
    first, second = nodes.both(checkouts=(ROOT, other))
    assert (first.returncode, second.returncode) == (MISTAKE, MISTAKE), first.stderr
    assert len(first.errors) == 1 and second.errors == []
    assert first.errors[0].startswith("error: code differs: ") and " on n1; " in first.errors[0]


def test_a_wrong_key_is_one_line_of_all_ranks_together(nodes: Nodes) -> None:
    first, second = nodes.both("parallel.pp_sise=2")
    assert (first.returncode, second.returncode) == (MISTAKE, MISTAKE)
    assert [line for ended in (first, second) for line in ended.errors] == first.errors[:1]
    assert "parallel.pp_sise" in first.errors[0]


def test_a_node_that_does_not_come_is_written_down(nodes: Nodes) -> None:
    with nodes.start(0, "--timeout", "3", "--nodes", "n1,n2", "--bad-nodes", "bad") as job:
        ended = job.wait(120)
    assert ended.returncode == NODE and ended.errors == ["error: rank 1 (n2): has not come"]
    assert (nodes.folder / "bad").read_text() == "n2\n"


def test_without_rank_0_there_is_one_line_and_with_its_port_taken_another(nodes: Nodes) -> None:
    with nodes.start(1, "--timeout", "2") as job:
        ended = job.wait(120)
    assert ended.returncode == NODE and ended.stderr.count("\n") == 1
    assert f"rank 0 at 127.0.0.1:{nodes.port} does not answer in 2 s" in ended.errors[0]
    with socket.create_server(("", nodes.port), reuse_port=False), nodes.start(0) as job:
        ended = job.wait(120)
    assert ended.returncode == MISTAKE and len(ended.errors) == 1
    assert "choose another MASTER_PORT" in ended.errors[0]
