"""The proof of an export or import accepts the checkpoint's own model alone, and names what is wrong."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalite.checkpoint.format import CheckpointError
from megalite.checkpoint.hf import export
from megalite.checkpoint.proof import prove
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
    assert found.weight == "model.norm.weight" and found.departure.name == "model.norm"
    assert re.search("cast: .*, of model.norm.weight\n(.*\n)first differs after model.norm, by ", str(found))


def test_weights_alone_are_no_proof(weights, tmp_path):
    """The same numbers, read with another rope base."""
    other = Weights(weights.checkpoint, weights.model.model_copy(update={"rope_theta": 500.0}), weights.dtype)
    found = verify_export(weights, export(other, tmp_path / "hf"))
    assert found.weight_difference == 0 and not found.holds
    assert found.weight is None and found.departure.name == "model.layers.0.self_attn"


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
        (Verification(0.0, 9e-6, 1.0), True),
        (Verification(0.0, 1.1e-5, 1.0), False),
        (Verification(0.0, torch.nan, 1.0), False),
        (Verification(1e-9, 0.0, 1.0), False),
    ],
)
def test_it_holds_within_the_tolerance_only(found, holds):
    assert found.holds is holds


# What converters have done wrong, and the part of the model that is then named.


def permute_pairs(projection: str, num_heads: int):
    """The order of Meta's own files: pairs (2j, 2j+1)."""

    def change(tensors, config):
        weight = tensors[projection]
        pairs = weight.view(num_heads, 4, 2, 32).transpose(1, 2)
        tensors[projection] = pairs.reshape(weight.shape).contiguous()

    return change


def exchanged(one: str, other: str):
    return lambda tensors, config: exchange(tensors, one, other)


def configured(**changes):
    return lambda tensors, config: config.update(changes)


def changed(name: str, change):
    def apply(tensors, config):
        tensors[name] = change(tensors[name]).contiguous()

    return apply


def leave_padding_in_the_middle(tensors, config):
    """Two padded shards put together and cut at the end, where each should have been."""
    embedding = tensors["model.embed_tokens.weight"]
    padding = embedding.new_zeros(32, 32)
    whole = torch.cat([embedding[:129], padding, embedding[129:], padding])
    tensors["model.embed_tokens.weight"] = whole[:257].contiguous()


def leave_padding_at_the_end(tensors, config):
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name].new_zeros(127, 32)])
    config["vocab_size"] = 384


def read_as_tied(tensors, config):
    del tensors["lm_head.weight"]
    config["tie_word_embeddings"] = True


def shift_layers(tensors, config):
    """As where counting began at 1: each layer gets the tensors of the one before."""
    for name in [name for name in tensors if ".layers.0." in name]:
        exchange(tensors, name, name.replace(".0.", ".1."))


LAYER = "model.layers.1"
PLAIN_ROPE = {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}}
WRONG_CONVERTERS = {
    "query permuted": ("plain", permute_pairs(f"{LAYER}.self_attn.q_proj.weight", 4), f"{LAYER}.self_attn"),
    "key permuted": ("plain", permute_pairs(f"{LAYER}.self_attn.k_proj.weight", 2), f"{LAYER}.self_attn"),
    "gate and up exchanged": (
        "plain",
        exchanged(f"{LAYER}.mlp.gate_proj.weight", f"{LAYER}.mlp.up_proj.weight"),
        f"{LAYER}.mlp",
    ),
    "key head misplaced": (
        "plain",
        changed(f"{LAYER}.self_attn.k_proj.weight", lambda weight: weight.roll(8, 0)),
        f"{LAYER}.self_attn",
    ),
    "value head misplaced": (
        "plain",
        changed(f"{LAYER}.self_attn.v_proj.weight", lambda weight: weight.roll(8, 0)),
        f"{LAYER}.self_attn",
    ),
    "output transposed": (
        "plain",
        changed(f"{LAYER}.self_attn.o_proj.weight", lambda weight: weight.T),
        f"{LAYER}.self_attn",
    ),
    "norms of a layer exchanged": (
        "plain",
        exchanged(f"{LAYER}.input_layernorm.weight", f"{LAYER}.post_attention_layernorm.weight"),
        f"{LAYER}.input_layernorm",
    ),
    "one layer off by one": ("plain", shift_layers, "model.layers.0.input_layernorm"),
    "padding in the middle": ("plain", leave_padding_in_the_middle, "model.embed_tokens"),
    "padding at the end": (
        "plain",
        leave_padding_at_the_end,
        "embed_tokens.weight has shape [384, 32]",
    ),
    "untied read as tied": ("plain", read_as_tied, "lm_head.weight is only in one of"),
    "tied read as untied": ("tied", configured(tie_word_embeddings=False), "lm_head"),
    "epsilon": ("plain", configured(rms_norm_eps=1e-6), "model.layers.0.input_layernorm"),
    "theta": (
        "plain",
        configured(rope_theta=500.0, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
        "model.layers.0.self_attn",
    ),
    "rope scaling ignored": ("llama3", configured(**PLAIN_ROPE), "model.layers.0.self_attn"),
    "final norm less one": ("plain", changed("model.norm.weight", lambda weight: weight - 1), "model.norm"),
    "query bias left out": (
        "qwen2",
        changed(f"{LAYER}.self_attn.q_proj.bias", torch.zeros_like),
        f"{LAYER}.self_attn",
    ),
    "norms of heads exchanged": (
        "qwen3",
        exchanged(f"{LAYER}.self_attn.q_norm.weight", f"{LAYER}.self_attn.k_norm.weight"),
        f"{LAYER}.self_attn",
    ),
    "experts exchanged": (
        "experts",
        exchanged(f"{MLP}.experts.0.up_proj.weight", f"{MLP}.experts.1.up_proj.weight"),
        MLP,
    ),
    "gates not scaled": ("experts", configured(routed_scaling_factor=1.0), "model.layers.1.mlp"),
}


@pytest.fixture(scope="module")
def right_exports(tmp_path_factory):
    """variant -> (weights, their export)."""
    made = {}
    for variant in {variant for variant, _, _ in WRONG_CONVERTERS.values()}:
        root, run = tmp_path_factory.mktemp("right"), tiny_run(variant)
        weights = Weights(save_llama(root, random_llama(run.model), run), run.model)
        made[variant] = weights, export(weights, root / "hf")
    return made


@pytest.mark.parametrize("wrong", WRONG_CONVERTERS)
def test_a_wrong_converter_is_noticed_and_the_part_named(right_exports, tmp_path, capsys, wrong):
    variant, change, part = WRONG_CONVERTERS[wrong]
    weights, right = right_exports[variant]
    shutil.copytree(right, tmp_path / "hf")
    config = json.loads((right / "config.json").read_text())
    change_export(tmp_path / "hf", lambda tensors: change(tensors, config))
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    files = sorted(tmp_path.rglob("*"))
    try:
        status = prove(lambda: verify_export(weights, tmp_path / "hf"), weights.model, True, "they differ")
    except CheckpointError as error:
        assert part in str(error) and "\n" not in str(error)
        return
    told = capsys.readouterr()
    assert status == 1 and told.err.endswith("error: they differ\n") and "verified" not in told.out
    assert re.search(rf"^first differs after {re.escape(part)}, by \d\.\de[-+]\d\d relative$", told.out, re.M)
    assert sorted(tmp_path.rglob("*")) == files
