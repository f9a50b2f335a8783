"""A run that resumes is the run that never stopped, bit for bit; and another layout may take over."""

import pytest
import torch

from megalite.config.checkpoint import CheckpointConfig
from megalite.training import checkpoints as module
from megalite.training.checkpoints import Checkpoints
from megalite.training.course import Course
from megalite.training.engine import initialize_communication
from tests.harness import run_distributed
from tests.trainers import ADAM, Case, build_trainer, deepspeed_config, micro_batches, run_config

CASES = [
    *(Case(tp=2, dp=2, zero=zero, tied=zero > 1) for zero in (0, 1, 2, 3)),
    Case(tp=2, pp=2, tied=True),
    Case(dp=2, zero=1, precision="bf16"),
    Case(tp=2, zero=3, precision="bf16"),
    Case(pp=2, dp=2, zero=2, tied=True),
]
STOP, LAST = 3, 6


def train(rank, case, folder, first, last, save_at=None):
    """Steps first to last, after resuming where there is a checkpoint; losses and norms as they came."""
    initialize_communication()
    run = run_config(case, output_dir=str(folder), checkpoint=CheckpointConfig(save_every_steps=STOP))
    trainer = build_trainer(rank, case)
    checkpoints = Checkpoints(run, deepspeed_config(case), rank, lambda text: None)
    assert checkpoints.resume(trainer.engine) == first - 1
    curve = []
    for step in range(first, last + 1):
        result = trainer.train_step(micro_batches(step, trainer.context), ADAM.learning_rate / step)
        curve.append((result.loss, result.grad_norm))
        if step == save_at:
            checkpoints.save(trainer.engine, step)
    return curve


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(case, tmp_path):
    whole = run_distributed(train, case.world_size, case, tmp_path, 1, LAST, STOP)[0]
    resumed = run_distributed(train, case.world_size, case, tmp_path, STOP + 1, LAST)[0]
    assert resumed == whole[STOP:]
    assert resumed != whole[:STOP]


MOVES = [
    (Case(tp=2, dp=2), Case()),
    (Case(zero=0), Case(tp=2, pp=2)),
    (Case(tp=2, pp=2, zero=1), Case(dp=2, zero=3)),
    (Case(pp=2, dp=2, zero=2, tied=True), Case(tp=4, zero=3, tied=True)),
    (Case(pp=2, dp=2, schedule="zbv", tied=True), Case(pp=2, zero=1, schedule="interleaved", tied=True)),
    (Case(pp=2, zero=2, schedule="interleaved", tied=True), Case(pp=2, tied=True)),
]


@pytest.mark.parametrize(("before", "after"), MOVES, ids=str)
def test_another_layout_continues_the_run(before, after, tmp_path):
    """Exact state, then the arithmetic of another layout: as near as test_equivalence's first step."""
    whole = run_distributed(train, before.world_size, before, tmp_path, 1, LAST, STOP)[0]
    moved = run_distributed(train, after.world_size, after, tmp_path, STOP + 1, LAST)[0]
    torch.testing.assert_close(torch.tensor(moved), torch.tensor(whole[STOP:]), rtol=1e-4, atol=0)


def resume_with_another_batch_size(rank, folder):
    initialize_communication()
    run = run_config(Case(), output_dir=str(folder))
    other = deepspeed_config(Case()).model_copy(update={"train_batch_size": 16})
    lines = []
    checkpoints = Checkpoints(run, other, rank, lines.append)
    course = Course.after(checkpoints.look(), other.train_batch_size)
    assert checkpoints.resume(build_trainer(rank, Case()).engine) == 2
    told = list(lines)
    here = module.versions()
    module.versions = lambda: here | {"torch": "9.9", "numpy": "unknown"}
    checkpoints.resume(build_trainer(rank, Case()).engine)
    return course, told, lines[len(told) :], here["torch"]


def test_another_batch_size_goes_on_with_the_sample_after_the_last_and_other_versions_are_told(tmp_path):
    run_distributed(train, 1, Case(), tmp_path, 1, 2, 2)
    ((course, lines, of_other_versions, torch_version),) = run_distributed(
        resume_with_another_batch_size, 1, tmp_path
    )
    assert [course.start_of(step) for step in (3, 4)] == [2 * 8, 2 * 8 + 16]
    assert lines[-1].endswith("step-00000002, after 16 samples")
    changed = (
        f"versions since step-00000002: torch {torch_version} -> 9.9; numbers may differ in their last bits"
    )
    assert of_other_versions == [lines[-1], changed]
