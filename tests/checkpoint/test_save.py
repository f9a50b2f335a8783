"""A checkpoint is complete or does not exist."""

import errno
import hashlib
import json
import os
import shutil
import traceback
from typing import Any

import pytest
import torch
from safetensors import safe_open

from megalite.checkpoint import save
from megalite.checkpoint.format import CheckpointError, Piece, list_steps, read_manifest
from megalite.checkpoint.load import find_checkpoint, read_state, read_tensor
from megalite.checkpoint.retention import Retention
from megalite.checkpoint.save import save_checkpoint
from megalite.checkpoint.space import SPARE_BYTES
from tests.checkpoint.worlds import alone, cut_all, even_cut, run_world, save_world

FULL = torch.arange(24, dtype=torch.float32).reshape(6, 4)
NORM = torch.arange(4, dtype=torch.float32)
TENSORS = {("weight", "w"): FULL, ("exp_avg", "w"): -FULL, ("weight", "norm"): NORM}


def four_ranks() -> list[list[Piece]]:
    """tp 2 x dp 2; `norm` is replicated over tp."""
    return cut_all(TENSORS, lambda name, _: even_cut(0 if name == "w" else None, tp_size=2, dp_size=2))


def one_rank(scale: float = 1.0) -> list[Piece]:
    return [Piece("w", "weight", (6, 4), (0, 0), (6, 4), 0, scale * FULL.reshape(-1))]


def save_alone(root, step, pieces, state=None, files=None, **retention):
    kept = Retention(**retention)
    return save_checkpoint(
        root, step, pieces, state or {}, files or {}, rank=0, world_size=1, gather=alone, retention=kept
    )


def test_a_checkpoint_has_its_files_and_their_checksums_in_the_manifest(tmp_path):
    folder = save_world(tmp_path, 100, four_ranks(), {"step": 100}, {"config.yaml": "seed: 1\n"})
    assert folder == tmp_path / "step-00000100"
    ranks = {f"rank-{rank:05d}.safetensors" for rank in range(4)}
    names = {"manifest.json", "state.json", "config.yaml", *ranks}
    assert {path.name for path in folder.iterdir()} == names
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000100"]
    manifest = read_manifest(folder)
    assert manifest.step == 100 and manifest.world_size == 4
    assert set(manifest.files) == names - {"manifest.json"}
    for name, entry in manifest.files.items():
        data = (folder / name).read_bytes()
        assert (entry.size_bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert manifest.shapes("weight") == {"w": (6, 4), "norm": (4,)}
    assert manifest.shapes("exp_avg") == {"w": (6, 4)}
    assert read_state(folder) == {"step": 100}


def test_the_safetensors_library_reads_a_ranks_file(tmp_path):
    folder = save_alone(tmp_path, 1, one_rank())
    with safe_open(folder / "rank-00000.safetensors", framework="pt") as file:
        (key,) = file.keys()
        assert file.get_tensor(key).equal(FULL.reshape(-1))
        assert json.loads(file.metadata()["pieces"])[0][:4] == [key, "weight", "w", [6, 4]]


def test_a_rank_that_owns_nothing_writes_no_file(tmp_path):
    first, second = one_rank(), one_rank()
    idle = [Piece(p.name, p.kind, p.full_shape, p.box_start, p.box_shape, 0, p.tensor, False) for p in second]
    folder = save_world(tmp_path, 1, [first, idle])
    assert not (folder / "rank-00001.safetensors").exists()
    assert find_checkpoint(tmp_path) == folder


def test_an_error_on_one_rank_is_an_error_on_all_and_leaves_nothing(tmp_path, monkeypatch):
    kept = save_world(tmp_path, 100, four_ranks())
    write = save.write_tensor_file

    def fail_on_rank_2(path, *args):
        if path.name == "rank-00002.safetensors":
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, *args)

    monkeypatch.setattr(save, "write_tensor_file", fail_on_rank_2)
    with pytest.raises(CheckpointError, match=r"step-00000200 was not saved: rank 2: .*No space left"):
        save_world(tmp_path, 200, four_ranks())
    assert list(tmp_path.iterdir()) == [kept]
    assert find_checkpoint(tmp_path) == kept


def test_everything_is_synced_before_the_rename_and_the_parent_after_it(tmp_path, monkeypatch):
    events: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor):
        events.append("sync " + os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        real_fsync(descriptor)

    def rename(source, target):
        events.append(f"rename to {os.path.relpath(target, tmp_path)}")
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    folder = save_alone(tmp_path, 1, one_rank())
    written = [f"sync {folder.name}.tmp/{path.name}" for path in folder.iterdir()]
    assert sorted(events[:3]) == sorted(written) and "manifest.json" in events[2]
    assert events[3:] == [f"sync {folder.name}.tmp", f"rename to {folder.name}", "sync ."]


def test_old_checkpoints_are_removed_and_the_newest_never(tmp_path):
    for step in (10, 20, 30, 40):
        save_alone(tmp_path, step, one_rank(), last=2)
    assert list_steps(tmp_path) == [30, 40]
    save_alone(tmp_path, 50, one_rank(), last=1)
    assert list_steps(tmp_path) == [50]
    save_alone(tmp_path, 60, one_rank(), last=0)
    assert list_steps(tmp_path) == [50, 60]


def test_a_run_that_was_wound_back_keeps_what_it_writes(tmp_path):
    for step in (10, 20, 30):
        save_alone(tmp_path, step, one_rank())
    save_alone(tmp_path, 15, one_rank(), last=1)
    assert list_steps(tmp_path) == [15, 20, 30]


def test_saving_a_step_again_replaces_it(tmp_path):
    save_alone(tmp_path, 10, one_rank())
    folder = save_alone(tmp_path, 10, one_rank(2))
    assert read_tensor(folder, "weight", "w").equal(2 * FULL)
    assert list(tmp_path.iterdir()) == [folder]


def test_a_missing_piece_is_refused(tmp_path):
    ranks = four_ranks()
    ranks[3] = [piece for piece in ranks[3] if piece.kind != "exp_avg"]
    with pytest.raises(CheckpointError, match="exp_avg w: the pieces hold 18 of 24 elements"):
        save_world(tmp_path, 1, ranks)
    assert not list(tmp_path.iterdir())


def test_a_piece_that_two_ranks_own_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="weight w: two pieces hold the same elements"):
        save_world(tmp_path, 1, [one_rank(), one_rank()])


def test_a_tensor_that_nobody_owns_is_refused(tmp_path):
    orphan = Piece("orphan", "weight", (2,), (0,), (2,), 0, torch.zeros(2), owned=False)
    with pytest.raises(CheckpointError, match="weight orphan: no rank owns a piece of it"):
        save_alone(tmp_path, 1, [*one_rank(), orphan])


def test_a_bug_keeps_its_traceback_where_it_is_and_the_other_ranks_hear_of_it(tmp_path):
    def save_on(rank, gather):
        state = {"rng": torch.zeros(2)}  # which JSON does not hold
        return save_checkpoint(tmp_path, 1, ranks[rank], state, {}, rank=rank, world_size=4, gather=gather)

    ranks = four_ranks()
    first, *others = run_world(4, save_on)
    assert type(first) is TypeError and "is not JSON serializable" in str(first)
    assert any(frame.name == "write_texts" for frame in traceback.extract_tb(first.__traceback__))
    assert all(type(error) is CheckpointError for error in others)
    assert all(
        "step-00000001 was not saved: rank 0: TypeError: Object of type Tensor" in str(e) for e in others
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensor": torch.zeros(2, 2)}, r"weight w: a piece is 1-D, not \(2, 2\)"),
        (
            {"tensor": torch.zeros(4, dtype=torch.int64)},
            "weight w: torch.int64 does not fit into torch.float32",
        ),
        (
            {"tensor": torch.zeros(4, dtype=torch.bool)},
            "torch.bool does not fit into torch.float32, the widest that is stored",
        ),
        ({"tensor": torch.zeros(4, dtype=torch.float64)}, "torch.float64 does not fit"),
        ({"tensor": torch.zeros(4, dtype=torch.complex64)}, "torch.complex64 does not fit"),
        ({"box_start": (5, 0)}, "is not inside"),
        ({"flat_start": 5}, "flat range 5:9 is not inside its box of 8"),
    ],
)
def test_a_piece_that_cannot_be_is_refused(change, message):
    fields: dict[str, Any] = {
        "name": "w",
        "kind": "weight",
        "full_shape": (6, 4),
        "box_start": (4, 0),
        "box_shape": (2, 4),
        "flat_start": 0,
        "tensor": torch.zeros(4),
    }
    Piece(**fields)
    Piece(**fields | {"tensor": torch.zeros(4, dtype=torch.bfloat16)})
    with pytest.raises(CheckpointError, match=message):
        Piece(**(fields | change))


def test_the_best_and_those_of_round_steps_stay_as_their_states_say(tmp_path):
    for step, loss in ((10, 1.0), (20, 0.5), (30, None), (40, 0.7), (50, 0.9)):
        state = {} if loss is None else {"validation_loss": loss}
        save_alone(tmp_path, step, one_rank(), state=state, last=1, every_steps=30, best=1)
    assert list_steps(tmp_path) == [20, 30, 50]
    (tmp_path / "step-00000020" / "state.json").write_text("{")  # damaged: nothing to keep it for
    save_alone(tmp_path, 60, one_rank(), last=1, every_steps=30, best=1)
    assert list_steps(tmp_path) == [30, 50, 60]


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    save_alone(tmp_path, 10, one_rank())
    size_bytes = sum(piece.tensor.nbytes for rank in four_ranks() for piece in rank if piece.owned)
    usage = lambda free: lambda folder: shutil._ntuple_diskusage(0, 0, free)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", usage(size_bytes + SPARE_BYTES - 1))
    with pytest.raises(CheckpointError, match=r"has 1\.0 MB free and a checkpoint needs 1\.0 MB: free some"):
        save_world(tmp_path, 20, four_ranks())
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]
    monkeypatch.setattr(shutil, "disk_usage", usage(size_bytes + SPARE_BYTES))
    save_world(tmp_path, 20, four_ranks())
    assert list_steps(tmp_path) == [10, 20]
