"""Nine layouts save; each loads what each has saved, and saves it again: all tensors and moments equal."""

import shutil

import pytest

from megalite.checkpoint.load import TensorReader
from megalite.config.checkpoint import CheckpointConfig
from megalite.training.checkpoints import Checkpoints
from megalite.training.engine import initialize_communication
from tests.harness import run_distributed
from tests.trainers import ADAM, Case, build_trainer, deepspeed_config, micro_batches, run_config

LAYOUTS = [
    Case(zero=0),
    Case(tp=2, zero=3),
    Case(pp=2, zero=1),
    Case(dp=2, zero=2),
    Case(tp=4, zero=1),  # more ranks than key heads
    Case(tp=2, dp=2, zero=3),
    Case(pp=2, dp=2, zero=3, layers=(1, 3)),
    Case(tp=2, pp=2, zero=0),
    Case(cp=2, dp=2, zero=3, way="ring"),
]
STEP = 2


def checkpoints_in(folder, case, rank):
    run = run_config(case, output_dir=str(folder), checkpoint=CheckpointConfig(save_every_steps=STEP))
    return Checkpoints(run, deepspeed_config(case), rank, lambda line: None)


def train_and_save(rank, case, folder):
    initialize_communication()
    trainer = build_trainer(rank, case)
    for step in range(1, STEP + 1):
        trainer.train_step(micro_batches(step, trainer.context), ADAM.learning_rate)
    checkpoints_in(folder, case, rank).save(trainer.engine, STEP)


def load_and_save_each(rank, case, folders):
    initialize_communication()
    trainer = build_trainer(rank, case)
    for source, target in folders:
        if rank == 0:
            shutil.copytree(source, target)
        checkpoints = checkpoints_in(target, case, rank)
        assert checkpoints.resume(trainer.engine) == STEP
        checkpoints.save(trainer.engine, STEP)  # in the place of the copy


def tensors_of(folder):
    reader = TensorReader(folder / f"checkpoints/step-{STEP:08d}")
    return {
        (entry.kind, entry.name): reader.read(entry.kind, entry.name) for entry in reader.manifest.tensors
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    for number, case in enumerate(LAYOUTS):
        run_distributed(train_and_save, case.world_size, case, root / str(number))
    return [root / str(number) for number in range(len(LAYOUTS))]


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_a_layout_loads_and_saves_what_all_others_have_saved(case, saved, tmp_path):
    folders = [(source, tmp_path / source.name) for source in saved]
    run_distributed(load_and_save_each, case.world_size, case, folders)
    before = None
    for source, target in folders:
        expected, found = tensors_of(source), tensors_of(target)
        assert expected.keys() == found.keys()
        assert {kind for kind, _ in found} == {"weight", "exp_avg", "exp_avg_sq"}
        assert all(found[key].equal(tensor) for key, tensor in expected.items()), source.name
        if before is not None:  # each layout's roundings are its own: nothing is left of the one before
            assert not all(found[key].equal(tensor) for key, tensor in before.items())
        before = found
