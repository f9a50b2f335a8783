"""Checkpoints on the nodes' own disks: whole over all nodes or nothing, and carried as they are.

Nodes are folders: which ranks share one is a list of names.
"""

import errno
import json
import os
import shutil

import pytest
import torch

from megalite.checkpoint import local
from megalite.checkpoint.format import CheckpointError, list_steps
from megalite.checkpoint.load import find_checkpoint, read_state, read_tensor
from megalite.checkpoint.local import LocalDiskError, NodeDisk, bring, carry, find_freight, save_locally
from tests.chaos.power import spoil
from tests.checkpoint.worlds import cut_all, even_cut, run_world, save_world

FULL = torch.arange(24, dtype=torch.float32).reshape(6, 4)
NORM = torch.arange(4, dtype=torch.float32)
NODES = ("n0", "n0", "n1", "n1")
TEXTS = {"config.yaml": "a: 1\n"}


def pieces_of(step):
    """tp 2 x dp 2; of `norm`, rank 0 and rank 2 have what is written."""
    tensors = {("weight", "w"): step * FULL, ("exp_avg", "w"): -step * FULL, ("weight", "norm"): step * NORM}
    return cut_all(tensors, lambda name, _: even_cut(0 if name == "w" else None, tp_size=2, dp_size=2))


def in_world(folder, body, nodes=NODES):
    """body(disk, gather) on each rank; what rank 0's gave. Errors are the same on all ranks, and raised."""

    def on_rank(rank, gather):
        return body(NodeDisk(folder / "local" / nodes[rank], nodes, rank), gather)

    results = run_world(len(nodes), on_rank)
    errors = [result for result in results if isinstance(result, Exception)]
    if errors:
        assert len(errors) == len(nodes) and len({str(error) for error in errors}) == 1, errors
        raise errors[0]
    return results[0]


def save(folder, step):
    pieces = pieces_of(step)
    in_world(
        folder,
        lambda disk, gather: save_locally(
            disk, step, pieces[disk.rank], {"step": step}, TEXTS, gather=gather
        ),
    )


def share(folder, step, nodes=NODES):
    return in_world(
        folder,
        lambda disk, gather: carry(
            disk, find_freight(disk, step, gather=gather), folder / "checkpoints", gather=gather
        ),
        nodes,
    )


def bring_newest(folder, newer_than=-1, nodes=NODES):
    """The step that is brought, and what is told."""
    told: list[str] = []

    def body(disk, gather):
        tell = told.append if disk.rank == 0 else lambda text: None
        return bring(disk, range(newer_than + 1, 100), folder / "checkpoints", tell, gather=gather)

    found = in_world(folder, body, nodes)
    return found and read_state(found)["step"], told


def local_files(folder, node, step):
    return sorted(path.name for path in (folder / f"local/{node}/step-{step:08d}").iterdir())


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_node_has_its_ranks_files_and_what_is_carried_is_what_is_saved_at_once(tmp_path):
    save(tmp_path, 3)
    texts = ["config.yaml", "manifest.json", "rank-00000.safetensors", "rank-00001.safetensors", "state.json"]
    assert local_files(tmp_path, "n0", 3) == texts
    ranks = ["manifest.json", "rank-00002.safetensors", "rank-00003.safetensors"]
    assert local_files(tmp_path, "n1", 3) == ranks
    assert not (tmp_path / "checkpoints").exists()
    at_once = save_world(tmp_path / "at once", 3, pieces_of(3), {"step": 3}, TEXTS)
    carried = share(tmp_path, 3)
    assert carried == tmp_path / "checkpoints/step-00000003"
    expected = content(at_once)
    found = content(carried)
    manifests = [json.loads(files.pop("manifest.json")) for files in (expected, found)]
    assert found == expected
    assert all(manifest.pop("sha256") for manifest in manifests)
    for manifest in manifests:
        manifest["files"] = sorted(manifest["files"].items())
    assert manifests[0] == manifests[1]
    assert find_checkpoint(tmp_path / "checkpoints") == carried


@pytest.mark.parametrize(
    "nodes",
    [NODES, ("n1", "n1", "n0", "n0"), ("n1", "n0"), ("n0", "n1", "n2"), ("n1", *NODES)],
)
def test_whichever_ranks_are_on_the_nodes_it_is_brought_bit_for_bit(nodes, tmp_path):
    save(tmp_path, 3)
    assert bring_newest(tmp_path, nodes=nodes) == (3, [])
    found = find_checkpoint(tmp_path / "checkpoints", pytest.fail)
    assert found is not None and read_tensor(found, "exp_avg", "w").equal(-3 * FULL)
    assert read_tensor(found, "weight", "norm").equal(3 * NORM)
    assert bring_newest(tmp_path, newer_than=3, nodes=nodes) == (None, [])


@pytest.mark.parametrize(("lost", "file"), [("n0", "state.json"), ("n1", "rank-00002.safetensors")])
def test_a_lost_node_is_named_with_what_it_had(lost, file, tmp_path):
    save(tmp_path, 3)
    shutil.rmtree(tmp_path / f"local/{lost}")
    step, (line,) = bring_newest(tmp_path)
    assert step is None and not (tmp_path / "checkpoints").exists()
    assert line.startswith("checkpoint step-00000003 on the nodes is not whole and is skipped: ")
    assert line.endswith(f"{file} was written on {lost} and is not on n0, n1")


def test_a_job_on_other_nodes_has_not_what_its_old_ones_have(tmp_path):
    save(tmp_path, 3)
    step, (line,) = bring_newest(tmp_path, nodes=("n0", "n2"))
    assert step is None
    assert line.endswith("rank-00002.safetensors was written on n1 and is not on n0, n2")
    assert bring_newest(tmp_path, nodes=("n2", "n3")) == (None, [])


@pytest.mark.parametrize("kind", ["missing", "truncated", "empty", "zeros", "flipped"])
@pytest.mark.parametrize("file", ["manifest.json", "rank-00003.safetensors"])
def test_damage_on_a_node_is_passed_over(kind, file, tmp_path):
    save(tmp_path, 3)
    assert spoil(tmp_path / "local/n1/step-00000003" / file, kind)
    step, told = bring_newest(tmp_path)
    assert step is None and len(told) == 1 and "rank-0000" in told[0]
    assert not (tmp_path / "checkpoints").exists()


def test_one_is_kept_and_none_of_a_course_that_was_left(tmp_path):
    for step in (3, 4, 6):
        save(tmp_path, step)
        assert all(list_steps(tmp_path / "local" / node) == [step] for node in ("n0", "n1"))
    save(tmp_path, 5)  # step 6 was passed over: it must not come back
    assert all(list_steps(tmp_path / "local" / node) == [5] for node in ("n0", "n1"))
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("place", ["write_pieces", "publish", "create_aside"])
def test_where_one_node_fails_no_node_has_it_and_the_one_before_is_whole(place, tmp_path, monkeypatch):
    save(tmp_path, 3)
    done = getattr(local, place)

    def fail(first, *rest):
        if "local/n1" in str(first):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(first))
        return done(first, *rest)

    monkeypatch.setattr(local, place, fail)
    with pytest.raises(LocalDiskError, match=r"step-00000004 was not saved on the nodes: rank 2: .*No space"):
        save(tmp_path, 4)
    monkeypatch.undo()
    assert all(list_steps(tmp_path / "local" / node) == [3] for node in ("n0", "n1"))
    assert bring_newest(tmp_path) == (3, [])


@pytest.mark.parametrize("place", ["copy_file", "create_aside", "finish_checkpoint"])
def test_what_cannot_be_carried_stays_on_the_nodes(place, tmp_path, monkeypatch):
    save(tmp_path, 3)

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "a file")

    monkeypatch.setattr(local, place, fail)
    with pytest.raises(CheckpointError, match="step-00000003 was not carried from the nodes: rank 0: "):
        bring_newest(tmp_path)
    monkeypatch.undo()
    assert list_steps(tmp_path / "checkpoints") == []
    assert bring_newest(tmp_path) == (3, [])


def test_room_is_looked_at_on_each_node_and_in_the_shared_folder(tmp_path, monkeypatch):
    save(tmp_path, 3)
    usage = shutil.disk_usage

    def full(part):
        none = shutil._ntuple_diskusage(0, 0, 0)
        return lambda folder: none if part in str(folder) else usage(folder)

    monkeypatch.setattr(shutil, "disk_usage", full("local/n1"))
    with pytest.raises(LocalDiskError, match=r"rank 2: .*has 0 bytes free .* another checkpoint.local_dir"):
        save(tmp_path, 4)
    monkeypatch.setattr(shutil, "disk_usage", full("checkpoints"))
    with pytest.raises(CheckpointError, match=r"rank 0: .*has 0 bytes free .* another output_dir"):
        bring_newest(tmp_path)


def test_a_file_that_changed_on_its_way_is_not_published(tmp_path):
    save(tmp_path, 3)
    assert spoil(tmp_path / "local/n1/step-00000003/rank-00003.safetensors", "flipped")
    with pytest.raises(CheckpointError, match=r"rank 3: .*is not what was written there"):
        share(tmp_path, 3)  # which does not verify before
    assert list_steps(tmp_path / "checkpoints") == []
