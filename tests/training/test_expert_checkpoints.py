"""Experts over four ranks, saved: every layout loads them exactly, and continues the run."""

from functools import cache

import pytest
import torch

from megalite.checkpoint.load import TensorReader, find_checkpoint
from megalite.config.checkpoint import CheckpointConfig
from megalite.training.checkpoints import Checkpoints
from megalite.training.engine import initialize_communication
from tests.harness import run_distributed
from tests.trainers import ADAM, Case, build_trainer, deepspeed_config, micro_batches, run_config

STOP, LAST = 3, 6
BEFORE = Case(dp=4, ep=4, model_kind="experts")
AFTER = [
    Case(dp=4, ep=4, model_kind="experts"),
    Case(dp=4, ep=2, model_kind="experts"),
    Case(dp=2, ep=2, model_kind="experts"),
    Case(dp=2, ep=1, zero=2, model_kind="experts"),
    Case(zero=0, model_kind="experts"),
    Case(tp=2, pp=2, zero=1, model_kind="experts"),
    Case(tp=2, dp=2, ep=2, model_kind="experts"),
    Case(pp=4, model_kind="experts"),
]


def checkpoints_in(folder, case, rank):
    run = run_config(case, output_dir=str(folder), checkpoint=CheckpointConfig(save_every_steps=STOP))
    return Checkpoints(run, deepspeed_config(case), rank, lambda text: None)


def steps(trainer, first, last):
    curve = []
    for step in range(first, last + 1):
        result = trainer.train_step(micro_batches(step, trainer.context), ADAM.learning_rate / step)
        curve.append((result.loss, result.grad_norm, result.experts.tokens, result.experts.biases))
    return curve


def train_and_save(rank, folder):
    initialize_communication()
    trainer = build_trainer(rank, BEFORE)
    steps(trainer, 1, STOP)
    checkpoints_in(folder, BEFORE, rank).save(trainer.engine, STOP)
    return steps(trainer, STOP + 1, LAST)


def resume_all(rank, folder, cases):
    """What each layout loads, it saves again; then it goes on."""
    initialize_communication()
    curves = []
    for case in cases:
        trainer = build_trainer(rank, case)
        assert checkpoints_in(folder, case, rank).resume(trainer.engine) == STOP
        checkpoints_in(folder / str(case), case, rank).save(trainer.engine, STOP)
        curves.append(steps(trainer, STOP + 1, LAST))
    return curves


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder, the curve of the run that went on, and by layout that of the one that resumed."""
    folder = tmp_path_factory.mktemp("experts")
    whole = run_distributed(train_and_save, 4, folder)[0]
    resumed = {}
    for world_size in (1, 2, 4):
        cases = [case for case in AFTER if case.world_size == world_size]
        found = run_distributed(resume_all, world_size, folder, cases, timeout_seconds=200)[0]
        resumed |= dict(zip(cases, found, strict=True))
    return folder, whole, resumed


@cache
def state_in(folder):
    """Every tensor of the checkpoint, by kind and name."""
    reader = TensorReader(find_checkpoint(folder / "checkpoints"))
    return {(t.kind, t.name): reader.read(t.kind, t.name) for t in reader.manifest.tensors}


@pytest.mark.parametrize("case", AFTER, ids=str)
def test_all_state_is_loaded_bit_for_bit(case, runs):
    folder, _, _ = runs
    saved, again = state_in(folder), state_in(folder / str(case))
    assert saved.keys() == again.keys()
    assert {kind for kind, _ in saved} == {"weight", "exp_avg", "exp_avg_sq", "buffer"}
    assert all(torch.equal(saved[key], again[key]) for key in saved)
    assert any(tensor.any() for (kind, _), tensor in saved.items() if kind == "buffer")


@pytest.mark.parametrize("case", AFTER, ids=str)
def test_the_run_goes_on_as_it_would_have(case, runs):
    """In the same layout bit for bit; in another as near as test_equivalence's first step."""
    _, whole, resumed = runs
    if case == BEFORE:
        assert resumed[case] == whole
    numbers = [torch.tensor([step[:2] for step in curve]) for curve in (resumed[case], whole)]
    torch.testing.assert_close(*numbers, rtol=1e-4, atol=0)
    assert [step[2:] for step in resumed[case]] == [step[2:] for step in whole]


def resume_with_other_experts(rank, folder):
    initialize_communication()
    case = Case(model_kind="experts")
    trainer = build_trainer(rank, case, model=case.model.model_copy(update={"n_routed_experts": 16}))
    checkpoints_in(folder, case, rank).resume(trainer.engine)


def test_a_checkpoint_with_another_number_of_experts_is_refused_in_one_line(runs):
    with pytest.raises(AssertionError, match=r"has shape \[8.*\[16.* use the model settings"):
        run_distributed(resume_with_other_experts, 1, runs[0])
