"""Imported weights train in every layout as in a plain loop of transformers and AdamW on the same folder,
and go out of every layout: untouched bit for bit, and trained to the same model of transformers.

Tolerances are those of tests/test_equivalence.py.
"""

from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megalite.checkpoint.format import step_folder
from megalite.checkpoint.hf import export, import_folder
from megalite.checkpoint.hf_folder import HFFolder
from megalite.checkpoint.weights import Weights
from megalite.config.checkpoint import CheckpointConfig
from megalite.config.run import RunConfig
from megalite.training.checkpoints import Checkpoints
from megalite.training.engine import initialize_communication
from tests.checkpoint.llamas import random_llama
from tests.harness import run_distributed
from tests.reference import Curve, assert_same_numbers, learning_rate_of, mean_loss, train_reference
from tests.trainers import (
    BIAS_RATE,
    MODELS,
    Case,
    build_trainer,
    deepspeed_config,
    global_batch,
    micro_batches,
    run_config,
)

NUM_STEPS = 5
LAYOUTS = [
    Case(zero=0),
    Case(tp=2, zero=2, sp=False),
    Case(pp=2, zero=1),
    Case(dp=2, zero=3),
    Case(tp=2, pp=2, zero=3, recompute="full"),
    Case(tp=4, zero=1, model_kind="norms"),  # with copies of key heads
    Case(pp=2, dp=2, zero=2, model_kind="norms"),
    Case(model_kind="qkv biases"),
    Case(tp=2, pp=2, zero=2, model_kind="qkv biases"),
    Case(tp=4, zero=1, model_kind="qkv biases"),  # with copies of key heads, and of their biases
    Case(tp=4, zero=3, sp=False, model_kind="qkv biases"),
    Case(tp=2, dp=2, ep=2, zero=3, model_kind="normed experts"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Of each kind of model KIND/hf as transformers writes it, and its import in KIND/checkpoints."""
    root = tmp_path_factory.mktemp("folders")
    for kind in {case.model_kind for case in LAYOUTS}:
        random_llama(MODELS[kind]).save_pretrained(root / kind / "hf")
        folder = HFFolder(root / kind / "hf")
        import_folder(folder, root / kind / "checkpoints", RunConfig(model=folder.model))
    return root


@cache
def expected(folders: Path, kind: str) -> tuple[Curve, float]:
    """What transformers computes, and the loss of the trained model on a further batch."""
    theirs = AutoModelForCausalLM.from_pretrained(folders / kind / "hf", dtype=torch.float32).train()
    batches = [global_batch(step) for step in range(NUM_STEPS)]
    curve = train_reference(theirs, MODELS[kind], batches, bias_rate=BIAS_RATE)
    return curve, further_loss(theirs)


@torch.no_grad()
def further_loss(theirs: torch.nn.Module) -> float:
    return mean_loss(theirs, global_batch(NUM_STEPS)).item()


@cache
def curves_of_world(folders: Path, world_size: int) -> dict[Case, list[Curve]]:
    """Each rank's curve of every layout of so many ranks, which are started once."""
    cases = [case for case in LAYOUTS if case.world_size == world_size]
    by_rank = run_distributed(train_cases, world_size, cases, folders, timeout_seconds=280)
    return {case: [curves[i] for curves in by_rank] for i, case in enumerate(cases)}


def train_cases(rank: int, cases: list[Case], folders: Path) -> list[Curve]:
    initialize_communication()
    return [train_case(rank, case, folders) for case in cases]


def train_case(rank: int, case: Case, folders: Path) -> Curve:
    start = CheckpointConfig(start_from=str(folders / case.model_kind / "checkpoints"))
    run = run_config(case, output_dir=str(folders / f"run {case}"), checkpoint=start)
    trainer = build_trainer(rank, case)
    checkpoints = Checkpoints(run, deepspeed_config(case), rank, lambda text: None)
    assert checkpoints.resume(trainer.engine) == 0
    checkpoints.save(trainer.engine, 0)
    curve = Curve()
    for step in range(NUM_STEPS):
        result = trainer.train_step(micro_batches(step, trainer.context, case), learning_rate_of(step))
        curve.losses.append(result.loss)
        curve.norms.append(result.grad_norm)
    checkpoints.save(trainer.engine, NUM_STEPS)
    return curve


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_imported_weights_train_as_in_a_plain_loop_of_transformers(folders, case):
    want, _ = expected(folders, case.model_kind)
    for curve in curves_of_world(folders, case.world_size)[case]:
        assert_same_numbers("loss", curve.losses, want.losses)
        assert_same_numbers("norm", curve.norms, want.norms)


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_what_a_layout_holds_goes_out_as_transformers_model(folders, tmp_path, case):
    got = curves_of_world(folders, case.world_size)[case][0]
    want, further = expected(folders, case.model_kind)
    before = HFFolder(folders / case.model_kind / "hf").tensors
    untouched = HFFolder(exported(folders, case, 0, tmp_path / "untouched")).tensors
    assert before.keys() == untouched.keys()
    assert [name for name, tensor in before.items() if not tensor.equal(untouched[name])] == []
    folder = exported(folders, case, NUM_STEPS, tmp_path / "trained")
    trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    assert_same_numbers("loss", [*got.losses, further_loss(trained)], [*want.losses, further])


def exported(folders: Path, case: Case, step: int, output: Path) -> Path:
    checkpoint = step_folder(folders / f"run {case}" / "checkpoints", step)
    return export(Weights(checkpoint, case.model), output)
