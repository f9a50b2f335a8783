"""A sample of what `make chaos` does by the hundred, and that it would notice."""

import random
from pathlib import Path

import pytest

from megalite.checkpoint import damage, save
from megalite.checkpoint.format import read_manifest
from megalite.checkpoint.publication import remove
from megalite.config.checkpoint import CheckpointConfig
from tests.chaos.faults import Fault
from tests.chaos.run import main, read
from tests.chaos.scenario import ChaosError, Play, Scenario, Undisturbed
from tests.trainers import Case

NUM_FAULTS = 10


def fault(kind: str, operation: str = "write", number: int = 1, **changes) -> Fault:
    facts = {"rank": 0, "half": False, "length": 1, "seconds": 0.0, "patience_seconds": 0.0}
    facts |= {"place": 0.5, "which": 0.0, "signal": 15}
    return Fault(kind=kind, operation=operation, number=number, **facts | changes)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def played(undisturbed: Undisturbed, tmp_path: Path) -> Play:
    """A run of two data-parallel ranks that keeps one checkpoint and saves each step at once."""
    settings = CheckpointConfig(asynchronous=False, save_every_steps=1, keep_last=1)
    return Play(Scenario(0, Case(dp=2, zero=1), settings), random.Random(0), undisturbed, tmp_path)


def test_a_sample_of_faults_changes_nothing(tmp_path, capsys):
    table = tmp_path / "chaos.jsonl"
    status = main(["--seed", "1", "--faults", str(NUM_FAULTS), "--table", str(table)])
    output = capsys.readouterr()
    assert status == 0, output.err
    rows = read(table)
    assert len(rows) == NUM_FAULTS and {row["result"] for row in rows} == {"equal"}
    assert len({row["kind"] for row in rows}) > 3
    assert f"| {NUM_FAULTS} | 0 |" in output.out
    assert main(["--faults", "0", "--table", str(table)]) == 0  # only tells what the table has
    assert f"| {NUM_FAULTS} | 0 |" in capsys.readouterr().out


def test_publishing_before_the_files_are_synced_is_noticed(played, monkeypatch):
    monkeypatch.setattr("megalite.checkpoint.tensor_file.sync", lambda file: file.flush())
    with pytest.raises(ChaosError, match="step 1 has other numbers"):
        played.happen(fault("power cut", "fsync", 3))  # before the folder of step 2 is synced
    assert [row["kind"] for row in played.rows] == ["power cut"]


def test_removing_the_old_checkpoint_before_the_new_one_is_there_is_noticed(played, monkeypatch):
    publish = save.publish

    def prune_and_publish(aside, folder):
        remove(folder.parent.glob("step-????????"))
        publish(aside, folder)

    monkeypatch.setattr(save, "publish", prune_and_publish)
    played.happen(fault("kill all", "rename", 2))  # the burial of step 1
    assert played.whole() == [1]
    with pytest.raises(ChaosError, match=r"\[\] are left where step 1 had been whole"):
        played.happen(fault("kill all", "rename", 2))  # the new name of step 2


def test_a_loader_that_does_not_look_at_checksums_is_noticed(played, monkeypatch):
    played.happen(fault("kill all", "rename", 3))
    assert played.whole() == [1, 2]
    monkeypatch.setattr(
        damage, "hash_file", lambda path, *_: read_manifest(path.parent).files[path.name].sha256
    )
    played.happen(fault("file flipped", which=0.5, place=0.9))
    assert played.rows[-1]["what"] == "step 2, rank-00000.safetensors"
    with pytest.raises(ChaosError, match="begins after step 2 where 1 is the newest"):
        played.happen(None)
