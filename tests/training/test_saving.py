"""Saves beside the training hold what a save at once holds, and what becomes of one that fails."""

import errno
import itertools
import threading

import pytest

from megalite.checkpoint import save as save_module
from megalite.checkpoint.format import CheckpointError, list_steps
from megalite.checkpoint.load import TensorReader, read_state
from megalite.config.checkpoint import CheckpointConfig
from megalite.training.checkpoints import Checkpoints
from megalite.training.engine import initialize_communication
from megalite.training.saving import Saving
from tests.harness import run_distributed
from tests.trainers import ADAM, Case, build_trainer, deepspeed_config, micro_batches, run_config

CASES = [
    Case(zero=0),
    Case(tp=2, dp=2, zero=1),
    Case(pp=2, dp=2, zero=2, tied=True),
    Case(tp=2, pp=2, zero=3),
    Case(dp=2, zero=3, precision="bf16"),
]
NUM_STEPS = 4


def build_saving(rank, case, folder, report, **settings):
    checkpoint = CheckpointConfig(save_every_steps=1, **settings)
    run = run_config(case, output_dir=str(folder), checkpoint=checkpoint)
    return Saving(Checkpoints(run, deepspeed_config(case), rank, report), run.checkpoint, report)


def train_and_save(rank, case, folder):
    """Each step saved at once, and beside the next one, which waits for nothing of the save."""
    initialize_communication()
    trainer = build_trainer(rank, case)
    kinds = {"once": False, "beside": True}
    savings = {
        name: build_saving(rank, case, folder / name, print, keep_last=0, asynchronous=beside)
        for name, beside in kinds.items()
    }
    may_write = threading.Event()
    write = save_module.write_pieces

    def write_late(aside, pieces, rank):
        if threading.current_thread() is not threading.main_thread():
            assert may_write.wait(60), "the training waits for the save"
        return write(aside, pieces, rank)

    save_module.write_pieces = write_late
    told = []
    for step in range(1, NUM_STEPS + 1):
        may_write.set()
        for saving in savings.values():
            saving.finish()
        trainer.train_step(micro_batches(step, trainer.context), ADAM.learning_rate)
        may_write.clear()
        for saving in savings.values():
            saving.save(trainer.engine, step, {"validation_loss": step / 8})
        told.append(sorted(savings["beside"].metrics()) + sorted(savings["beside"].metrics()))
        trainer.train_step(micro_batches(step, trainer.context), ADAM.learning_rate)
    may_write.set()
    savings["beside"].finish()
    return told


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_save_beside_the_training_equals_one_at_once_bit_for_bit(case, tmp_path):
    told = run_distributed(train_and_save, case.world_size, case, tmp_path)[0]
    assert told == [["save_stall_seconds"]] * NUM_STEPS
    seen = []
    for step in range(1, NUM_STEPS + 1):
        folders = [tmp_path / name / f"checkpoints/step-{step:08d}" for name in ("once", "beside")]
        once, beside = map(TensorReader, folders)
        assert read_state(folders[0]) == read_state(folders[1])
        assert read_state(folders[1])["validation_loss"] == step / 8
        assert once.manifest.tensors == beside.manifest.tensors
        for entry in once.manifest.tensors:
            first, second = (reader.read(entry.kind, entry.name) for reader in (once, beside))
            assert first.equal(second), (step, entry)
        seen.append(once.read("weight", "model.norm.weight"))
    assert not any(a.equal(b) for a, b in itertools.pairwise(seen))


def save_on_a_disk_that_fills(rank, folder, settings, failing_rank):
    """What was told of three saves, of which the second fails on one rank."""
    case = Case(dp=2, zero=1)
    initialize_communication()
    trainer = build_trainer(rank, case)
    lines, outcomes = [], []
    saving = build_saving(rank, case, folder, lines.append, **settings)
    write = save_module.write_tensor_file

    def write_or_fail(path, *rest):
        entry = write(path, *rest)
        if rank == failing_rank and "step-00000002" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return entry

    save_module.write_tensor_file = write_or_fail
    for step in (1, 2, 3):
        trainer.train_step(micro_batches(step, trainer.context), ADAM.learning_rate)
        try:
            saving.save(trainer.engine, step)
            outcomes.append("saved")
        except CheckpointError:
            outcomes.append("stopped")
            break
    if outcomes[-1] == "saved":
        saving.finish()
    return outcomes, lines, saving.metrics().get("failed_saves", 0), str(saving.failure)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_save_that_fails_leaves_the_one_before_and_training_goes_on(asynchronous, failing_rank, tmp_path):
    settings = {"asynchronous": asynchronous, "on_failure": "continue"}
    for outcomes, lines, num_failed, failure in run_distributed(
        save_on_a_disk_that_fills, 2, tmp_path, settings, failing_rank
    ):
        assert outcomes == ["saved"] * 3 and num_failed == 1 and failure == "None"
        (line,) = lines
        assert line.startswith(f"step-00000002 was not saved: rank {failing_rank}: ")
        assert line.endswith("No space left on device; training goes on (checkpoint.on_failure)")
    assert list_steps(tmp_path / "checkpoints") == [1, 3]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_save_that_fails_stops_the_run_where_that_is_asked(asynchronous, tmp_path):
    settings = {"asynchronous": asynchronous, "on_failure": "stop"}
    expected = ["saved", "saved", "stopped"] if asynchronous else ["saved", "stopped"]
    for outcomes, lines, num_failed, failure in run_distributed(
        save_on_a_disk_that_fills, 2, tmp_path, settings, 1
    ):
        assert outcomes == expected and num_failed == 1 and lines == []
        assert failure.startswith("step-00000002 was not saved: rank 1: ")
    assert list_steps(tmp_path / "checkpoints") == [1]
