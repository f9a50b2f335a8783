"""The decoder equals Hugging Face's Llama, Mistral, Qwen2 and Qwen3: loss and every gradient, in float64, and
parameter names and counts.

Both compute rotary angles in fp32, everything else in float64 (transformers' norm is told to); the two
differ by the order of sums, some units of 1e-16. 1e-9 relative leaves room for
sums over all tokens and would not hide a wrong term.
"""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megalite.batch import Batch
from megalite.checkpoint.hf_config import hf_config
from megalite.config.model import ModelConfig
from megalite.model.flops import num_parameters
from megalite.model.llama import LlamaStage
from megalite.model.rope import RotaryEmbedding, inverse_frequencies
from megalite.model.table import model_table
from megalite.parallel.plan import LayerPlan

SMALL = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "one key for each query": {"num_key_value_heads": 4},
    "wide heads": {"head_dim": 16},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3 rope, other theta and eps": {
        "rope_scaling": LLAMA3,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-6,
    },
}


QKV_BIASES = {"attention_bias": True, "attention_out_bias": False}
# The family of transformers' class, and what the model has that SMALL has not.
EVERY: dict[str, tuple[str, dict]] = {
    **{name: ("llama", changes) for name, changes in VARIANTS.items()},
    "mistral": ("mistral", {"rope_theta": 1e6, "head_dim": 12}),
    "qwen2": ("qwen2", QKV_BIASES | {"tie_word_embeddings": True, "rms_norm_eps": 1e-6}),
    "qwen2, wide heads": ("qwen2", QKV_BIASES | {"head_dim": 16}),
    "qwen3": ("qwen3", {"use_qk_norm": True, "head_dim": 16, "rms_norm_eps": 1e-3}),
    "qwen3, biases": ("qwen3", {"use_qk_norm": True, "attention_bias": True, "rope_scaling": LLAMA3}),
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def build_twin(config: ModelConfig, family: str) -> nn.Module:
    """transformers' own class of a family; where it is not the one of the export, with the same fields."""
    fields = hf_config(config, "float32")
    if family == "mistral":
        fields |= {"model_type": "mistral", "sliding_window": SMALL["max_position_embeddings"]}
    assert fields["model_type"] == family
    config_class, model_class = FAMILIES[family]
    return model_class(config_class(**fields))


def twins(
    changes: dict, recompute: str = "none", family: str = "llama"
) -> tuple[ModelConfig, LlamaStage, nn.Module]:
    config = ModelConfig.model_validate(SMALL | changes)
    stage = LlamaStage(config, LayerPlan(dtype=torch.float64), seed=5, recompute=recompute)
    for index, parameter in enumerate(stage.parameters()):  # biases and norms as well are to matter
        if parameter.ndim == 1:
            generator = torch.Generator().manual_seed(index)
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    twin = build_twin(config, family).double()
    weights = {p.spec.name: p.detach()[: p.spec.box_shape[0]] for p in stage.parameters()}
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    twin.tie_weights()
    norms = [module for module in twin.modules() if type(module).__name__.endswith("RMSNorm")]
    assert len(norms) == (4 if config.use_qk_norm else 2) * config.num_hidden_layers + 1
    for norm in norms:
        norm.forward = partial(_norm_in_float64, norm)
    return config, stage, twin


def _norm_in_float64(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """What LlamaRMSNorm computes, without its cast to fp32."""
    return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def loss_and_gradients(stage, twin) -> tuple[torch.Tensor, torch.Tensor, dict, dict]:
    tokens = torch.randint(SMALL["vocab_size"], (2, 41), generator=torch.Generator().manual_seed(1))
    ids, labels = tokens[:, :-1], tokens[:, 1:].contiguous()
    batch = Batch(ids, labels)
    loss = stage(None, batch) / batch.loss_count()
    expected = torch.nn.functional.cross_entropy(twin(ids).logits.flatten(0, 1), labels.flatten())
    loss.backward()
    expected.backward()
    ours = {p.spec.name: p.grad[: p.spec.box_shape[0]] for p in stage.parameters()}
    return loss, expected, ours, {name: p.grad for name, p in twin.named_parameters()}


@pytest.mark.parametrize(("family", "changes"), EVERY.values(), ids=EVERY.keys())
def test_loss_and_gradients_equal_transformers(family, changes):
    _, stage, twin = twins(changes, family=family)
    loss, expected, ours, theirs = loss_and_gradients(stage, twin)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        message = f"gradient of {name}"
        torch.testing.assert_close(ours[name], gradient, rtol=1e-8, atol=1e-11, msg=message)


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 2.5}, LLAMA3], ids=str)
def test_rotary_frequencies_equal_those_of_transformers(scaling):
    """With 32 pairs of dimensions, where Llama-3's scaling keeps some, stretches some and blends some."""
    config = ModelConfig.model_validate(SMALL | {"head_dim": 64, "rope_scaling": scaling})
    theirs = LlamaRotaryEmbedding(LlamaConfig(**hf_config(config, "float32"))).inv_freq
    ours = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    if scaling == LLAMA3:
        plain = inverse_frequencies(config.head_dim, config.rope_theta)
        ratios = (plain / ours).tolist()
        assert min(ratios) == 1 and max(ratios) == 8
        assert any(1.1 < ratio < 7.9 for ratio in ratios)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("name", ["plain", "qwen3"])
def test_recomputation_changes_nothing(name, recompute):
    family, changes = EVERY[name]
    _, stage, twin = twins(changes, recompute, family)
    loss, expected, ours, theirs = loss_and_gradients(stage, twin)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-8, atol=1e-11)


def test_the_comparison_notices_another_theta():
    _, stage, _ = twins({})
    _, _, twin = twins({"rope_theta": 20000.0})
    loss, expected, *_ = loss_and_gradients(stage, twin)
    assert abs(loss - expected) > 1e-6


def test_rotary_tables_of_all_lengths_are_one_that_grows():
    config = ModelConfig(**SMALL)
    rotary, fresh = RotaryEmbedding(config), RotaryEmbedding(config)
    for length in (*range(1, 40), 7, 33):
        x = torch.zeros(length, 1, 1, config.head_dim)
        whole = fresh.tables(torch.zeros(64, 1, 1, config.head_dim))
        for table, longer in zip(rotary.tables(x), whole, strict=True):
            assert table.shape == (length, 1, 1, config.head_dim) and table.equal(longer[:length])
    [(cos, sin)] = rotary._tables.values()
    assert len(cos) == len(sin) == 64


@pytest.mark.parametrize(("family", "changes"), EVERY.values(), ids=EVERY.keys())
def test_names_shapes_and_counts_agree_with_the_tables(family, changes):
    config, stage, twin = twins(changes, family=family)
    shapes = {p.spec.name: p.spec.full_shape for p in stage.parameters()}
    assert shapes == {row.name: row.shape for row in model_table(config)}
    assert num_parameters(config) == sum(p.numel() for p in twin.parameters())


def test_initial_weights_depend_on_seed_and_name_alone():
    def weights(seed: int, **changes) -> dict[str, torch.Tensor]:
        stage = LlamaStage(ModelConfig.model_validate(SMALL | changes), seed=seed)
        return {p.spec.name: p.detach() for p in stage.parameters()}

    first, again, other = weights(1), weights(1, num_hidden_layers=3), weights(2)
    matrices = [name for name in first if "proj" in name]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in matrices)
    assert len({float(first[name].flatten()[0]) for name in matrices}) == len(matrices)
    plain, residual = first["model.layers.0.mlp.up_proj.weight"], first["model.layers.0.mlp.down_proj.weight"]
    assert abs(plain.std() / SMALL["initializer_range"] - 1) < 0.05
    assert abs(residual.std() * 6**0.5 / SMALL["initializer_range"] - 1) < 0.05
