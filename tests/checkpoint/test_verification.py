"""The proof of an export accepts the checkpoint's own model and nothing else."""

import json
import shutil

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


# Exports of a model with experts that are wrong in one place.


@pytest.fixture(scope="module")
def expert_export(tmp_path_factory):
    root = tmp_path_factory.mktemp("experts")
    run = tiny_run("experts")
    weights = Weights(save_llama(root, random_llama(run.model), run), run.model, "bfloat16")
    return weights, export(weights, root / "hf")


@pytest.fixture
def copied(expert_export, tmp_path):
    shutil.copytree(expert_export[1], tmp_path / "hf")
    return tmp_path / "hf"


MLP = "model.layers.2.mlp"
BIAS = f"{MLP}.gate.e_score_correction_bias"


def exchange(tensors, one, other):
    tensors[one], tensors[other] = tensors[other], tensors[one]


def leave_biases_out(tensors):
    del tensors[BIAS]


WRONG_TENSORS = {
    "gate and up exchanged": lambda t: exchange(
        t, f"{MLP}.experts.3.gate_proj.weight", f"{MLP}.experts.3.up_proj.weight"
    ),
    "two experts exchanged": lambda t: exchange(
        t, f"{MLP}.experts.0.down_proj.weight", f"{MLP}.experts.1.down_proj.weight"
    ),
    "bias rounded": lambda t: t.update({BIAS: t[BIAS].bfloat16().float()}),
    "bias narrow": lambda t: t.update({BIAS: t[BIAS].bfloat16()}),
    "bias left out": leave_biases_out,
    "bias in its place, but zero": lambda t: t[BIAS].zero_(),
}


def holds(weights, exported) -> bool:
    try:
        return verify_export(weights, exported).holds
    except CheckpointError:
        return False


def test_an_export_with_experts_holds(expert_export):
    assert holds(*expert_export)


@pytest.mark.parametrize("wrong", WRONG_TENSORS)
def test_a_wrong_tensor_of_experts_is_noticed(expert_export, copied, wrong):
    change_export(copied, WRONG_TENSORS[wrong])
    assert not holds(expert_export[0], copied)


WRONG_CONFIGS = [
    {"norm_topk_prob": False},
    {"routed_scaling_factor": 1.0},
    {"num_experts_per_tok": 3},
    {"partial_rotary_factor": 0.5, "rope_parameters": None},
    {"first_k_dense_replace": 0},
]


@pytest.mark.parametrize("wrong", WRONG_CONFIGS, ids=str)
def test_a_wrong_config_of_experts_is_noticed(expert_export, copied, wrong):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | wrong))
    assert not holds(expert_export[0], copied)


@pytest.mark.parametrize(
    ("one", "other"), [("gate_proj", "up_proj"), ("experts.0.", "experts.1.")], ids=["projections", "experts"]
)
def test_a_wrong_table_of_names_is_noticed(expert_export, tmp_path, one, other):
    """Export and proof share the table of names: what is wrong in it shows in the logits."""
    right, _ = expert_export
    wrong = Weights(right.checkpoint, right.model, right.dtype)
    for name, part in right.parts.items():
        if one in name and ".experts." in name:
            partner = name.replace(one, other)
            wrong.parts[name] = right.parts[partner]._replace(name=name)
            wrong.parts[partner] = part._replace(name=partner)
    found = verify_export(wrong, export(wrong, tmp_path / "hf"))
    assert found.weight_difference == 0 and not found.holds


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
