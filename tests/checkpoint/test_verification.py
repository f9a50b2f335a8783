"""The proof of an export accepts the checkpoint's own model and nothing else."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalite.checkpoint.format import CheckpointError
from megalite.checkpoint.hf import export
from megalite.checkpoint.verification import Verification, verify_export
from megalite.checkpoint.weights import Weights
from tests.checkpoint.llamas import random_llama, save_llama, tiny_run


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    run = tiny_run()
    checkpoint = save_llama(tmp_path_factory.mktemp("checkpoints"), random_llama(run.model), run)
    return Weights(checkpoint, run.model, "bfloat16")


def change_export(folder, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def test_an_export_holds(weights, tmp_path):
    found = verify_export(weights, export(weights, tmp_path / "hf"))
    assert found.holds and found.weight_difference == 0 < found.largest_logit


@pytest.mark.parametrize("value", [0.125, torch.nan])
def test_an_export_with_another_number_does_not_hold(weights, tmp_path, value):
    exported = export(weights, tmp_path / "hf")
    change_export(exported, lambda tensors: tensors["model.norm.weight"][3].fill_(value))
    found = verify_export(weights, exported)
    assert not found.holds and found.weight_difference != 0


def test_weights_alone_are_no_proof(weights, tmp_path):
    """The same numbers, read with another rope base."""
    other = Weights(weights.checkpoint, weights.model.model_copy(update={"rope_theta": 500.0}), weights.dtype)
    found = verify_export(weights, export(other, tmp_path / "hf"))
    assert found.weight_difference == 0 and not found.holds


def test_a_tensor_too_few_is_named(weights, tmp_path):
    exported = export(weights, tmp_path / "hf")
    change_export(exported, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lm_head.weight is only in one of"):
        verify_export(weights, exported)


@pytest.mark.parametrize(
    ("found", "holds"),
    [
        (Verification(0.0, 9e-5, 1.0), True),
        (Verification(0.0, 1.1e-4, 1.0), False),
        (Verification(0.0, torch.nan, 1.0), False),
        (Verification(1e-9, 0.0, 1.0), False),
    ],
)
def test_it_holds_within_the_tolerance_only(found, holds):
    assert found.holds is holds
