"""Muon's momentum and AdamW's moments beside it: saved, moved between layouts bit for bit, not mixed up."""

import shutil

import pytest

from megalite.checkpoint.load import TensorReader
from megalite.config.checkpoint import CheckpointConfig
from megalite.config.optimizer import OptimizerConfig
from megalite.training.checkpoints import Checkpoints
from megalite.training.engine import initialize_communication
from tests.harness import run_distributed
from tests.test_muon_equivalence import MUON
from tests.trainers import ADAM, Case, build_trainer, deepspeed_config, micro_batches, run_config

STEP = 2
E = "experts"
LAYOUTS = [
    Case(zero=0, model_kind=E),
    Case(tp=2, pp=2, zero=1, model_kind=E),
    Case(tp=2, dp=2, ep=2, zero=3, model_kind=E),
    Case(dp=4, zero=2, model_kind=E),
]


def checkpoints_in(folder, case, rank, optimizer: OptimizerConfig = MUON):
    settings = CheckpointConfig(save_every_steps=STEP)
    run = run_config(case, optimizer, output_dir=str(folder), checkpoint=settings)
    return Checkpoints(run, deepspeed_config(case), rank, lambda line: None)


def steps(trainer, first, last):
    results = []
    for step in range(first, last + 1):
        result = trainer.train_step(micro_batches(step, trainer.context), MUON.learning_rate / step)
        results.append((result.loss, result.grad_norm))
    return results


def train_and_save(rank, case, folder):
    initialize_communication()
    trainer = build_trainer(rank, case, MUON)
    steps(trainer, 1, STEP)
    checkpoints_in(folder, case, rank).save(trainer.engine, STEP)
    return steps(trainer, STEP + 1, STEP + 2)


def load_and_save(rank, cases, source, targets):
    """Each layout loads, saves again and goes on."""
    initialize_communication()
    curves = []
    for case, target in zip(cases, targets, strict=True):
        if rank == 0:
            shutil.copytree(source, target)
        trainer = build_trainer(rank, case, MUON)
        checkpoints = checkpoints_in(target, case, rank)
        assert checkpoints.resume(trainer.engine) == STEP
        checkpoints.save(trainer.engine, STEP)  # in the place of the copy
        curves.append(steps(trainer, STEP + 1, STEP + 2))
    return curves


def tensors_of(folder):
    reader = TensorReader(folder / f"checkpoints/step-{STEP:08d}")
    return {
        (entry.kind, entry.name): reader.read(entry.kind, entry.name) for entry in reader.manifest.tensors
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Per layout that saved: the folder and its curve; per layout that loaded it: the same."""
    root = tmp_path_factory.mktemp("muon")
    found = {}
    for number, before in enumerate((LAYOUTS[1], LAYOUTS[2])):
        source = root / f"{number}"
        curve = run_distributed(train_and_save, 4, before, source)[0]
        again = {}
        for world_size in (1, 4):
            cases = [case for case in LAYOUTS if case.world_size == world_size]
            targets = [root / f"{number}-{LAYOUTS.index(case)}" for case in cases]
            curves = run_distributed(load_and_save, world_size, cases, source, targets, timeout_seconds=300)[
                0
            ]
            again |= {case: pair for case, *pair in zip(cases, targets, curves, strict=True)}
        found[before] = (source, curve, again)
    return found


@pytest.mark.parametrize("after", LAYOUTS, ids=str)
def test_all_state_is_loaded_bit_for_bit_and_the_run_goes_on(runs, after):
    """The same layout gives the same bits; another as near as the first steps of test_muon_equivalence."""
    for before, (source, curve, again) in runs.items():
        target, resumed = again[after]
        saved, found = tensors_of(source), tensors_of(target)
        assert saved.keys() == found.keys()
        assert all(found[key].equal(tensor) for key, tensor in saved.items())
        kinds = {kind for kind, _ in saved}
        assert kinds == {"weight", "buffer", "momentum_buffer", "exp_avg", "exp_avg_sq"}
        if after == before:
            assert resumed == curve
        assert [number for pair in resumed for number in pair] == pytest.approx(
            [number for pair in curve for number in pair], rel=1e-4
        )


def test_a_parameter_has_the_state_of_its_optimizer_alone(runs):
    (source, *_) = runs[LAYOUTS[1]]
    tensors = tensors_of(source)
    momenta = {name for kind, name in tensors if kind == "momentum_buffer"}
    moments = {name for kind, name in tensors if kind == "exp_avg"}
    assert not momenta & moments
    assert momenta | moments == {name for kind, name in tensors if kind == "weight"}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.gate.weight"} <= moments
    assert {"model.layers.1.mlp.experts.up_proj.weight", "model.layers.0.mlp.down_proj.weight"} <= momenta
    assert all(tensors["momentum_buffer", name].any() for name in momenta)


def resume_with(rank, folder, optimizer):
    initialize_communication()
    case = LAYOUTS[0]
    checkpoints_in(folder, case, rank, optimizer).resume(build_trainer(rank, case, optimizer).engine)


def save_with_adamw(rank, folder):
    initialize_communication()
    trainer = build_trainer(rank, LAYOUTS[0], ADAM)
    checkpoints_in(folder, LAYOUTS[0], rank, ADAM).save(trainer.engine, STEP)


def test_another_optimizer_is_refused_in_one_line(runs, tmp_path):
    (source, *_) = runs[LAYOUTS[1]]
    with pytest.raises(AssertionError, match=r"holds .*momentum_buffer, weight per tensor and this run has"):
        run_distributed(resume_with, 1, source, ADAM)
    run_distributed(save_with_adamw, 1, tmp_path)
    with pytest.raises(AssertionError, match=r"this run has .*momentum_buffer, weight: keep the optimizer"):
        run_distributed(resume_with, 1, tmp_path, MUON)
