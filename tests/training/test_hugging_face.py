"""Between Hugging Face and training: what any layout saves goes out, and what comes in is trained on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megalite.checkpoint.format import CheckpointError, list_steps
from megalite.checkpoint.hf import export, import_folder
from megalite.checkpoint.hf_folder import HFFolder
from megalite.checkpoint.load import TensorReader, read_config
from megalite.checkpoint.model import build_megalite_model, megalite_logits
from megalite.checkpoint.weights import Weights
from megalite.config.checkpoint import CheckpointConfig
from megalite.config.run import RunConfig
from megalite.training.checkpoints import Checkpoints
from megalite.training.engine import initialize_communication
from tests.checkpoint.llamas import random_llama
from tests.harness import run_distributed
from tests.reference import mean_loss
from tests.trainers import (
    ADAM,
    EXPERTS,
    MODEL,
    Case,
    build_trainer,
    deepspeed_config,
    global_batch,
    micro_batches,
    run_config,
)

CASES = [
    Case(model_kind="experts"),
    Case(model_kind="experts", tp=2, dp=2, ep=2, zero=3),
    Case(model_kind="experts", tp=2, pp=2, zero=1),
    Case(model_kind="experts", dp=2, pp=2, zero=2, tied=True),
    Case(tp=2, dp=2, zero=3),
]
UNSEEN = 9  # a step whose batch nobody trained on


def checkpoints_of(rank: int, case: Case, folder: Path, report=lambda text: None, **options) -> Checkpoints:
    run = run_config(case, output_dir=str(folder), checkpoint=CheckpointConfig(**options))
    return Checkpoints(run, deepspeed_config(case), rank, report)


def loss_on(trainer, case: Case) -> float:
    return trainer.evaluate(micro_batches(UNSEEN, trainer.context, case)).mean


def train_two_steps(rank, case, folder):
    """Loss on an unseen batch after them."""
    initialize_communication()
    trainer = build_trainer(rank, case)
    for step in (1, 2):
        trainer.train_step(micro_batches(step, trainer.context, case), ADAM.learning_rate)
    checkpoints_of(rank, case, folder).save(trainer.engine, 2)
    return loss_on(trainer, case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_a_layout_saves_goes_out_as_it_was_trained(case, tmp_path):
    loss = run_distributed(train_two_steps, case.world_size, case, tmp_path)[0]
    checkpoint = tmp_path / "checkpoints" / "step-00000002"
    weights = Weights(checkpoint, read_config(checkpoint).model)
    theirs = AutoModelForCausalLM.from_pretrained(export(weights, tmp_path / "hf"), dtype=torch.float32)
    batch = global_batch(UNSEEN)
    with torch.no_grad():
        logits, theirs_loss = theirs(batch.input_ids).logits, mean_loss(theirs, batch).item()
    expected = megalite_logits(build_megalite_model(weights), batch.input_ids)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert loss == pytest.approx(theirs_loss, rel=1e-5)
    biases = [name for name, part in weights.parts.items() if part.kind == "buffer"]
    assert len(biases) == (3 if case.model_kind == "experts" else 0)
    assert all(weights.read(name).any() for name in biases)


# A start from imported weights.

STARTS = [
    Case(model_kind="experts", zero=1),
    Case(model_kind="experts", tp=2, dp=2, ep=2, zero=3),
    Case(model_kind="experts", dp=2, zero=1, precision="bf16"),
    Case(tp=2, pp=2, zero=2),
]


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """model kind -> (transformers' model, its checkpoint)."""
    made = {}
    wide = MODEL.model_copy(update={"intermediate_size": 64})
    for kind, model in {"dense": MODEL, "experts": EXPERTS, "wide": wide}.items():
        root = tmp_path_factory.mktemp(kind)
        llama: Any = random_llama(model)
        llama.save_pretrained(root / "hf")
        folder = HFFolder(root / "hf")
        made[kind] = llama, import_folder(folder, root / "checkpoints", RunConfig(model=folder.model))
    return made


def start(rank, case, folder, start_from):
    """What is reported, the loss before any step and the first step's; then what a second process does."""
    initialize_communication()
    said: list[str] = []
    checkpoints = checkpoints_of(rank, case, folder, said.append, start_from=start_from)
    trainer = build_trainer(rank, case)
    first_step = checkpoints.resume(trainer.engine) + 1
    before = loss_on(trainer, case)
    checkpoints.save(trainer.engine, 1)
    batches = micro_batches(UNSEEN, trainer.context, case)
    losses = [trainer.train_step(batches, ADAM.learning_rate).loss for _ in range(2)]
    checkpoints.save(trainer.engine, 2)
    after = loss_on(trainer, case)
    again = build_trainer(rank, case)
    second_step = checkpoints.resume(again.engine) + 1
    return said, (first_step, second_step), (before, *losses), (after, loss_on(again, case))


@pytest.mark.parametrize("case", STARTS, ids=str)
def test_a_run_begins_with_the_weights_that_were_imported(case, imported, tmp_path):
    llama, checkpoint = imported[case.model_kind]
    result = run_distributed(start, case.world_size, case, tmp_path, str(checkpoint.parent))[0]
    said, steps, (before, first, second), (after, resumed) = result
    with torch.no_grad():
        expected = mean_loss(llama, global_batch(UNSEEN)).item()
    tolerance = 1e-5 if case.precision == "fp32" else 2e-2
    assert before == pytest.approx(expected, rel=tolerance)
    assert first == pytest.approx(before, rel=1e-6) and second < first
    # The run's own checkpoint wins over start_from.
    assert steps == (1, 3) and resumed == after != before
    assert said[0].startswith(f"starts from the weights of {checkpoint}")
    assert_fresh_start(TensorReader(tmp_path / "checkpoints" / "step-00000001"), TensorReader(checkpoint))
    assert said[1] == f"resumed from {tmp_path / 'checkpoints' / 'step-00000002'}"


def assert_fresh_start(started: TensorReader, imported: TensorReader) -> None:
    """Masters and biases are the imported ones bit for bit, the optimizer knows nothing."""
    assert {entry.kind for entry in started.manifest.tensors} >= {"weight", "exp_avg", "exp_avg_sq"}
    for entry in started.manifest.tensors:
        found = started.read(entry.kind, entry.name)
        if entry.kind in ("weight", "buffer"):
            assert found.equal(imported.read(entry.kind, entry.name)), entry.name
        else:
            assert not found.any(), entry.name


def start_twice(rank, case, folder):
    """Step and loss of a run that finds an import in its own folder, and what it says; then of one whose
    model has another setting."""
    initialize_communication()
    said: list[str] = []
    trainer = build_trainer(rank, case)
    checkpoints = checkpoints_of(rank, case, folder, said.append)
    step, loss = checkpoints.resume(trainer.engine), loss_on(trainer, case)
    model = case.model.model_copy(update={"rope_theta": 500.0})
    checkpoints.run = checkpoints.run.model_copy(update={"model": model})
    checkpoints.resume(trainer.engine)
    return step, loss, said


def test_an_import_among_a_runs_own_checkpoints_is_a_start(imported, tmp_path):
    llama, checkpoint = imported["experts"]
    (tmp_path / "checkpoints").symlink_to(checkpoint.parent)
    case = Case(model_kind="experts", zero=2)
    step, loss, said = run_distributed(start_twice, 1, case, tmp_path)[0]
    with torch.no_grad():
        assert loss == pytest.approx(mean_loss(llama, global_batch(UNSEEN)).item(), rel=1e-5)
    assert step == 0 and list_steps(tmp_path / "checkpoints") == [0]
    assert "rope_theta" not in said[0] and "; model.rope_theta 10000.0 -> 500.0" in said[1]


def refusals(rank, attempts, folder) -> list[str]:
    """What is said of each attempt to begin: (case, start_from)."""
    initialize_communication()
    told = []
    for case, start_from in attempts:
        checkpoints = checkpoints_of(rank, case, folder, start_from=start_from)
        with pytest.raises(CheckpointError) as caught:
            checkpoints.resume(build_trainer(rank, case).engine)
        told.append(str(caught.value))
    return told


def test_a_start_that_does_not_fit_is_refused_in_one_line(imported, tmp_path):
    experts, dense, wide = (str(imported[kind][1]) for kind in ("experts", "dense", "wide"))
    expected = [
        (Case(), wide, "mlp.gate_proj.weight has shape [64, 32] in"),
        (Case(), experts, "has no weight model.layers.1.mlp.gate_proj.weight"),
        (Case(model_kind="experts"), dense, "holds weight per tensor and this run has buffer, weight"),
        (Case(tied=True), dense, "has 1 tensors that this model has not, weight lm_head.weight"),
        (Case(), str(tmp_path / "absent"), "checkpoint.start_from: no checkpoint in "),
        (Case(), str(tmp_path / "step-00000007"), "there is no checkpoint "),
    ]
    attempts = [(case, start_from) for case, start_from, _ in expected]
    told = run_distributed(refusals, 1, attempts, tmp_path)[0]
    for line, (_, _, message) in zip(told, expected, strict=True):
        assert message in line and "\n" not in line
