"""Saves on a real file system of a few megabytes that is full, fills midway, turns read-only or vanishes.

It is mounted, which only root may; elsewhere these tests are skipped.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalite.checkpoint import save as save_module
from megalite.checkpoint.format import CheckpointError, Piece, list_steps
from megalite.checkpoint.load import find_checkpoint, read_tensor
from megalite.config.checkpoint import CheckpointConfig
from megalite.training.checkpoints import Capture, Checkpoints
from megalite.training.saving import Saving
from tests.trainers import Case, deepspeed_config, run_config

DISK_BYTES, TENSOR_BYTES = 8 << 20, 2 << 20  # room for two checkpoints and some


def mount(*arguments):
    return subprocess.run(["mount", *arguments], capture_output=True, text=True)


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = mount("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder))
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Numbers(Checkpoints):
    """Checkpoints of a run without an engine: each number tells of its step."""

    def capture(self, engine, step, standing=None):
        full = torch.full((TENSOR_BYTES // 4,), float(step))
        return Capture(step, [Piece("w", "weight", full.shape, (0,), full.shape, 0, full)], {"step": step})


class Run:
    def __init__(self, folder, asynchronous, on_failure="continue"):
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        settings = CheckpointConfig(asynchronous=asynchronous, on_failure=on_failure, keep_last=1)
        run = run_config(Case(), output_dir=str(folder), checkpoint=settings)
        self.told, self.root = [], folder / "checkpoints"
        checkpoints = Numbers(run, deepspeed_config(Case()), 0, self.told.append)
        self.saving = Saving(checkpoints, settings, self.told.append)

    def save(self, step):
        self.saving.save(None, step)
        self.saving.end()

    def check(self, step):
        """It is whole, and the newest."""
        assert list_steps(self.root)[-1] == step
        assert find_checkpoint(self.root, pytest.fail) == self.root / f"step-{step:08d}"
        assert set(read_tensor(self.root / f"step-{step:08d}", "weight", "w").tolist()) == {float(step)}

    def check_failure(self, step, *texts):
        """Told in one line, and training goes on."""
        (line,) = self.told
        assert line.startswith(f"step-{step:08d} was not saved: ") and all(text in line for text in texts), (
            line
        )
        assert line.endswith("; training goes on (checkpoint.on_failure)") and "\n" not in line
        assert self.saving.failure is not None
        assert not list(self.root.glob("*.tmp"))
        self.told.clear()


def fill(folder: Path, leave_bytes: int) -> Path:
    """Another's file, that takes all the room but for so much."""
    filler = folder / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(folder).free - leave_bytes))
    return filler


@pytest.fixture(params=[False, True], ids=["at once", "beside"])
def run(request, disk):
    run = Run(disk / "run", request.param)
    run.save(1)
    run.check(1)
    return run


def test_a_full_disk_leaves_the_checkpoint_before_and_training_goes_on(run, disk):
    filler = fill(disk, TENSOR_BYTES // 2)
    run.save(2)
    run.check_failure(2, "has 1.0 MB free and a checkpoint needs 3.1 MB")
    run.check(1)
    filler.unlink()
    run.save(3)
    run.check(3)
    assert run.saving.failure is None and run.told == []


def test_a_disk_that_fills_midway_leaves_the_checkpoint_before(run, disk, monkeypatch):
    create = save_module.create_aside

    def create_and_fill(root, aside, size_bytes):
        create(root, aside, size_bytes)
        fill(disk, TENSOR_BYTES // 2)

    monkeypatch.setattr(save_module, "create_aside", create_and_fill)
    run.save(2)
    run.check_failure(2, "No space left on device")
    monkeypatch.undo()
    run.check(1)
    (disk / "filler").unlink()
    run.save(3)
    run.check(3)


def test_a_disk_that_is_read_only_leaves_the_checkpoint_before(run, disk):
    assert mount("-o", "remount,ro", str(disk)).returncode == 0
    run.save(2)
    run.check_failure(2, "Read-only file system")
    run.check(1)
    assert mount("-o", "remount,rw", str(disk)).returncode == 0
    run.save(3)
    run.check(3)


def test_a_folder_that_vanishes_costs_no_more_than_what_was_in_it(run, disk, monkeypatch):
    shutil.rmtree(run.root)
    run.save(2)
    run.check(2)
    create = save_module.create_aside

    def create_and_vanish(root, aside, size_bytes):
        create(root, aside, size_bytes)
        shutil.rmtree(root)

    monkeypatch.setattr(save_module, "create_aside", create_and_vanish)
    run.save(3)
    run.check_failure(3, "No such file or directory")
    monkeypatch.undo()
    run.save(4)
    run.check(4)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_ends_the_run_where_that_is_asked(asynchronous, disk):
    run = Run(disk / "run", asynchronous, on_failure="stop")
    run.save(1)
    fill(disk, TENSOR_BYTES // 2)
    with pytest.raises(CheckpointError, match=r"step-00000002 was not saved: .* has 1.0 MB free"):
        run.save(2)
    assert run.told == []
    run.check(1)
