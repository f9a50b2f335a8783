"""A preflight among forked ranks, each said to be a node of its own, with a fault planted on one of them."""

import json
import multiprocessing
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed import FileStore

from megalite.config.deepspeed import load_deepspeed
from megalite.config.load import load_run
from megalite.exit_status import FINISHED, MISTAKE, NODE, STORAGE
from megalite.preflight import verdict
from megalite.preflight.course import Job, Probes, check_job, report_mistake
from megalite.preflight.groups import measure_groups
from megalite.preflight.inventory import take_inventory
from megalite.preflight.meeting import Meeting
from megalite.preflight.verdict import Verdict, table

WORLD_SIZE = 4
SECONDS = 15.0  # that a rank is waited for, on a machine with other work
DEEPSPEED = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}


class Ended(NamedTuple):
    """What rank 0 says, and the status of every rank; None of one that never came."""

    statuses: list[int | None]
    faults: list[str]
    bad_nodes: list[str]
    table: str


class Cluster:
    """Four ranks on nodes n0 to n3: cluster.check(plant, overrides) -> Ended.

    plant(rank) gives the rank's Probes, or None for a rank that never comes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.deepspeed = folder / "deepspeed.json"
        self.deepspeed.write_text(json.dumps(DEEPSPEED))

    def check(
        self, plant: Callable[[int], Probes | str | None], *overrides: str, ranks_per_node: int = 1
    ) -> Ended:
        fork = multiprocessing.get_context("fork")
        results = fork.Manager().dict()
        store = str(self.folder / uuid.uuid4().hex)
        arguments = (store, plant, list(overrides), ranks_per_node, results)
        ranks = [fork.Process(target=self._rank, args=(rank, *arguments)) for rank in range(WORLD_SIZE)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(60)
            assert process.exitcode == 0
        statuses = [results.get(rank) for rank in range(WORLD_SIZE)]
        return Ended(statuses, *results["told"])

    def _rank(
        self,
        rank: int,
        store: str,
        plant: Callable[[int], Probes | str | None],
        overrides: list[str],
        ranks_per_node: int,
        results: Any,
    ) -> None:
        torch.set_num_threads(1)
        probes = plant(rank)
        if probes is None:
            return
        settings = [f"output_dir={self.folder}/run", "parallel.tp_size=2", *overrides]
        run = load_run(None, settings, str(self.deepspeed))
        known = {"dp_size": run.dp_size_of(WORLD_SIZE), "hidden_size": run.model.hidden_size}
        deepspeed = load_deepspeed(str(self.deepspeed), "the run", **known)
        meeting = Meeting(FileStore(store, WORLD_SIZE), rank, WORLD_SIZE, SECONDS)
        judge, node = Verdict(WORLD_SIZE, ranks_per_node), f"n{rank // ranks_per_node}"
        if isinstance(probes, str):
            results[rank] = report_mistake(probes, node, meeting, judge)
        else:
            job = Job(run, deepspeed, node, lambda: torch.device("cpu"))
            results[rank] = check_job(job, meeting, judge, probes)
        if rank == 0:
            results["told"] = [fault.text for fault in judge.faults], judge.bad_nodes, table(judge)
        meeting.leave()


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Whose four ranks share the machine's cores: which of them is slow there says nothing of a node."""
    monkeypatch.setattr(verdict, "SLOW", 0.0)
    return Cluster(tmp_path)


def on_rank(rank: int, **probes: Any) -> Callable[[int], Probes]:
    """Faulty probes on one rank, sound ones on the others."""
    return lambda mine: Probes(**probes) if mine == rank else Probes()


def test_sound_nodes_pass_with_a_line_each_and_leave_nothing_behind(cluster: Cluster) -> None:
    ended = cluster.check(lambda rank: Probes(), ranks_per_node=2)
    assert ended.statuses == [FINISHED] * WORLD_SIZE and ended.faults == []
    lines = [line.split() for line in ended.table.splitlines()]
    assert [line[:3] for line in lines[1:3]] == [["n0", "0-1", "cpu"], ["n1", "2-3", "cpu"]]
    assert [" ".join(line[:-3]) for line in lines[4:]] == ["tp", "dp", "dp x cp x tp"]
    assert all(0 < float(line[-2]) <= float(line[-1]) for line in lines[4:])
    assert list((cluster.folder / "run").iterdir()) == []


def test_a_rank_that_does_not_come_is_named_with_the_node_of_its_neighbour(cluster: Cluster) -> None:
    ended = cluster.check(lambda rank: None if rank == 3 else Probes(), ranks_per_node=2)
    assert ended.statuses == [NODE, NODE, NODE, None]
    assert ended.faults == ["rank 3 (n1): has not come"] and ended.bad_nodes == ["n1"]


def test_other_code_and_other_versions_are_told_with_their_nodes(cluster: Cluster) -> None:
    def other(*arguments: Any) -> dict[str, str]:
        return take_inventory(*arguments) | {"code": "f00d", "numpy": "0.1"}

    ended = cluster.check(on_rank(2, inventory=other))
    assert ended.statuses == [MISTAKE] * WORLD_SIZE and ended.bad_nodes == []
    assert [fault.split()[0] for fault in ended.faults] == ["code", "numpy"]
    assert all("on n0, n1, n3; " in fault and " on n2: " in fault for fault in ended.faults)
    assert "f00d on n2" in ended.faults[0] and "0.1 on n2" in ended.faults[1]


def test_a_mistake_of_one_rank_is_told_with_it_and_one_of_all_without(cluster: Cluster) -> None:
    ended = cluster.check(lambda rank: "absent.yaml: No such file" if rank == 1 else Probes())
    assert ended.statuses == [MISTAKE] * WORLD_SIZE
    assert ended.faults == ["absent.yaml: No such file (ranks 1)"]
    assert cluster.check(lambda rank: "no such key").faults == ["no such key"]


def test_a_slow_rank_is_named(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "SLOW", 0.5)

    def product_of(rank: int, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        time.sleep(0.2 if rank == 3 else 0.03)  # beside which a product's own milliseconds are nothing
        return torch.mm(left, right)

    ended = cluster.check(lambda rank: Probes(multiply=partial(product_of, rank)))
    assert ended.statuses == [NODE] * WORLD_SIZE and ended.bad_nodes == ["n3"]
    assert len(ended.faults) == 1 and ended.faults[0].startswith("rank 3 (n3): is slow: ")


def test_a_rank_that_multiplies_wrongly_is_named(cluster: Cluster) -> None:
    def wrong(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        product = torch.mm(left, right)
        product[17, 3] += 1
        return product

    ended = cluster.check(on_rank(1, multiply=wrong))
    assert ended.statuses == [NODE] * WORLD_SIZE and ended.bad_nodes == ["n1"]
    assert ended.faults == ["rank 1 (n1): a matrix product is wrong"]


def test_a_node_that_sees_another_folder_is_named_and_a_folder_that_no_other_sees_is_a_mistake(
    cluster: Cluster,
) -> None:
    elsewhere = cluster.folder / "local"
    elsewhere.mkdir()
    ended = cluster.check(on_rank(2, seen_folder=lambda _: str(elsewhere)))
    assert ended.statuses == [NODE] * WORLD_SIZE and ended.bad_nodes == ["n2"], ended
    assert len(ended.faults) == 1 and ended.faults[0].startswith(f"n2: output_dir {cluster.folder}/run: ")
    assert "is not seen" in ended.faults[0]

    ended = cluster.check(lambda rank: Probes(seen_folder=lambda _: str(elsewhere)) if rank else Probes())
    assert ended.statuses == [MISTAKE] * WORLD_SIZE and ended.bad_nodes == []
    assert "is it shared? (on n1, n2, n3)" in ended.faults[0]


def test_data_that_is_not_there_is_a_mistake(cluster: Cluster) -> None:
    ended = cluster.check(lambda rank: Probes(), f"data.train={cluster.folder}/absent")
    assert ended.statuses == [MISTAKE] * WORLD_SIZE
    assert len(ended.faults) == 1 and f"{cluster.folder}/absent" in ended.faults[0]


def test_a_disk_without_room_for_a_checkpoint_is_told(cluster: Cluster) -> None:
    petabytes = (
        "model={vocab_size: 257, hidden_size: 131072, intermediate_size: 4194304, num_hidden_layers: 900}"
    )
    ended = cluster.check(lambda rank: Probes(), petabytes)
    assert ended.statuses == [STORAGE] * WORLD_SIZE
    assert len(ended.faults) == 1 and " GB free and a checkpoint needs " in ended.faults[0]


def test_a_rank_that_dies_or_hangs_among_the_collectives_is_told(cluster: Cluster) -> None:
    def hang(*arguments: Any) -> dict[str, float]:
        arguments[1]("tp")
        time.sleep(60)
        return measure_groups(*arguments)

    ended = cluster.check(on_rank(1, measure_groups=hang))
    assert ended.statuses == [NODE] * WORLD_SIZE
    assert "a collective over tp did not end on ranks 0-1 (n0, n1)" in ended.faults


def test_a_wrong_sum_is_named(cluster: Cluster) -> None:
    ended = cluster.check(on_rank(2, measure_groups=lambda *_: measure_groups(*_) | {"dp": 0.0}))
    assert ended.statuses == [NODE] * WORLD_SIZE and ended.bad_nodes == ["n2"]
    assert ended.faults == ["rank 2 (n2): an all-reduce over dp gave a wrong sum"]
