"""Random models of every shape come in with their logits and go out bit for bit.

Both compute in float32 and add in another order: 1e-5 of the largest logit is a hundred roundings.
"""

from itertools import product
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megalite.checkpoint.hf import export, import_folder
from megalite.checkpoint.hf_folder import HFFolder
from megalite.checkpoint.model import build_megalite_model, megalite_logits
from megalite.checkpoint.weights import Weights
from megalite.config.model import ModelConfig
from megalite.config.run import RunConfig
from tests.checkpoint.llamas import EXPERTS, VARIANTS, random_llama

SMALL = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
}
QKV_BIASES = {"attention_bias": True, "attention_out_bias": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, attention's biases": {"attention_bias": True},
    "llama, mlp's biases": {"mlp_bias": True},
    "qwen2": QKV_BIASES,
    "qwen3": {"use_qk_norm": True},
    "qwen3, biases": {"use_qk_norm": True, "attention_bias": True},
    "glm4": EXPERTS | {"use_qk_norm": True},
    "glm4, biases": EXPERTS | QKV_BIASES,
}
KEY_HEADS = (1, 2, 4, 8)
ROPES = [{}, VARIANTS["linear"], VARIANTS["llama3"]]
SIZES = list(product((False, True), (6, 10), (131, 256)))  # tied, head_dim, vocab_size


def shapes() -> dict[str, ModelConfig]:
    """Every family with every number of key heads; the rest takes turns."""
    made = {}
    for i, (family, key_heads) in enumerate(product(FAMILIES, KEY_HEADS)):
        tied, head_dim, vocab_size = SIZES[i % len(SIZES)]
        sizes = {"num_key_value_heads": key_heads, "head_dim": head_dim, "vocab_size": vocab_size}
        fields = SMALL | FAMILIES[family] | ROPES[i % len(ROPES)] | sizes | {"tie_word_embeddings": tied}
        made[f"{family}, {key_heads}"] = ModelConfig(**fields)
    return made


SHAPES = shapes()


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_a_random_model_comes_in_with_its_logits_and_goes_out_bit_for_bit(tmp_path, name):
    random_llama(SHAPES[name]).save_pretrained(tmp_path / "hf")
    folder = HFFolder(tmp_path / "hf")
    checkpoint = import_folder(folder, tmp_path / "checkpoints", RunConfig(model=folder.model))
    weights = Weights(checkpoint, folder.model)
    tokens = torch.randint(folder.model.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    expected = theirs(tokens).logits
    found = megalite_logits(build_megalite_model(weights), tokens)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    back = HFFolder(export(weights, tmp_path / "back")).tensors
    assert back.keys() == folder.tensors.keys()
    assert all(tensor.dtype == back[key].dtype for key, tensor in folder.tensors.items())
    assert [key for key, tensor in folder.tensors.items() if not tensor.equal(back[key])] == []


def test_every_shape_of_rope_embedding_vocabulary_and_head_is_among_them():
    found = SHAPES.values()
    assert {model.num_key_value_heads for model in found} == set(KEY_HEADS)
    assert {(m.tie_word_embeddings, m.head_dim, m.vocab_size) for m in found} == set(SIZES)
    ropes = {model.rope_scaling.rope_type if model.rope_scaling else None for model in found}
    assert ropes == {None, "linear", "llama3"}
