"""A run that resumes is the run that never stopped, bit for bit; and another layout may take over."""

import pytest
import torch

from megalite.config.run import CheckpointConfig
from megalite.training.checkpoints import Checkpoints
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
    Checkpoints(run, other, rank, lambda text: None).resume(build_trainer(rank, Case()).engine)


def test_another_batch_size_is_refused_since_it_would_lose_the_place_in_the_data(tmp_path):
    run_distributed(train, 1, Case(), tmp_path, 1, 2, 2)
    with pytest.raises(AssertionError, match="train_batch_size 8, the DeepSpeed JSON says 16: keep 8"):
        run_distributed(resume_with_another_batch_size, 1, tmp_path)
