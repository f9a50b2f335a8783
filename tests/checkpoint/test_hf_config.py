"""config.json, written for transformers 4 and 5, and read from what either wrote."""

import json
from typing import Any

import pytest
from transformers import AutoConfig

from megalite.checkpoint.format import CheckpointError
from megalite.checkpoint.hf_config import ARCHITECTURES, LLAMA, MISTRAL, QWEN2, QWEN3, hf_config, model_config
from megalite.config.model import ModelConfig
from tests.checkpoint.llamas import EXPERT_VARIANTS, VARIANTS, tiny_run

NEW_KEYS = ("rope_parameters", "dtype")  # of transformers 5
OLD_KEYS = ("rope_theta", "rope_scaling", "torch_dtype")  # of transformers 4


@pytest.mark.parametrize("variant", VARIANTS | EXPERT_VARIANTS)
@pytest.mark.parametrize("left_out", [(), NEW_KEYS, OLD_KEYS], ids=["both", "4", "5"])
def test_what_is_written_is_read_again_in_either_spelling(variant, left_out):
    model = tiny_run(variant).model
    config = json.loads(json.dumps(hf_config(model, "float32")))
    assert model_config({k: v for k, v in config.items() if k not in left_out}, "config.json") == model


@pytest.mark.parametrize("variant", VARIANTS | EXPERT_VARIANTS)
def test_transformers_reads_every_field_as_it_was_meant(variant):
    model = tiny_run(variant).model
    written = hf_config(model, "float32")
    read = AutoConfig.for_model(written["model_type"]).from_dict(written).to_dict()
    ours = {name for architecture in ARCHITECTURES.values() for name in architecture.fields}
    for name in ours & read.keys():
        assert read[name] == getattr(model, name, read[name]), name
    assert read["rope_parameters"] == written["rope_parameters"]


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_absent_keys_mean_what_they_mean_to_transformers(architecture):
    theirs = AutoConfig.for_model(architecture.model_type)
    follow = {name for name in ("head_dim", "num_key_value_heads") if architecture.optional[name] is None}
    for name in architecture.optional.keys() - follow:  # which follow from others
        assert architecture.optional[name] == getattr(theirs, name), name
    for name, value in architecture.computed.items():
        assert getattr(theirs, name, value) == value, name
    rope = theirs.rope_parameters
    assert (rope["rope_theta"], rope.get("partial_rotary_factor", 1.0)) == (
        10000.0,
        architecture.rotary_share,
    )


def test_heads_default_to_the_width_and_to_one_key_head_each():
    config = hf_config(tiny_run().model, "float32")
    del config["head_dim"], config["num_key_value_heads"], config["rope_parameters"], config["rope_theta"]
    model = model_config(config, "config.json")
    assert (model.head_dim, model.num_key_value_heads, model.rope_theta) == (8, 4, 10000.0)


def test_the_first_of_several_end_tokens_is_kept():
    config = hf_config(tiny_run().model, "float32") | {"eos_token_id": [7, 9]}
    assert model_config(config, "config.json").eos_token_id == 7


def test_the_config_is_spelled_for_transformers_4_and_5():
    linear = hf_config(tiny_run("linear").model, "bfloat16")
    assert linear["rope_theta"] == linear["rope_parameters"]["rope_theta"] == 50000.0
    assert linear["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert linear["rope_parameters"] == {"rope_type": "linear", "factor": 4.0, "rope_theta": 50000.0}
    assert linear["dtype"] == linear["torch_dtype"] == "bfloat16"
    plain = hf_config(tiny_run().model, "float32")
    assert plain["rope_scaling"] is None
    assert plain["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert plain[token] is None  # absent would mean 1 or 2


def test_experts_are_spelled_for_transformers_4_and_5():
    config = hf_config(tiny_run("experts").model, "bfloat16")
    assert (config["architectures"], config["model_type"]) == (["Glm4MoeForCausalLM"], "glm4_moe")
    # 4.57.6 reads the first only, and its default is 0.5
    assert config["partial_rotary_factor"] == config["rope_parameters"]["partial_rotary_factor"] == 1.0
    expected: dict[str, Any] = {"n_group": 1, "topk_group": 1, "use_qk_norm": False}
    expected |= {"num_nextn_predict_layers": 0, "n_routed_experts": 6, "num_experts_per_tok": 2}
    expected |= {"n_shared_experts": 1, "moe_intermediate_size": 20, "first_k_dense_replace": 1}
    expected |= {"norm_topk_prob": True, "routed_scaling_factor": 2.5, "head_dim": 8}
    expected |= {"attention_bias": False}
    assert {key: config[key] for key in expected} == expected
    others = {"mlp_bias", "pretraining_tp", "router_aux_loss_coef", "attention_out_bias"}
    assert not others & config.keys()
    assert not {"n_routed_experts", "scoring_func"} & hf_config(tiny_run().model, "float32").keys()


QKV_BIASES = {"attention_bias": True, "attention_out_bias": False}


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("experts", {"attention_bias": True}, "attention_out_bias is true and Glm4Moe.* false only"),
        ("plain", QKV_BIASES | {"mlp_bias": True}, "mlp_bias is true and Qwen2ForCausalLM.* false only"),
        ("plain", {"attention_out_bias": True}, "attention_out_bias is true and Qwen2For.* false only"),
        ("plain", QKV_BIASES | {"use_qk_norm": True}, "attention_out_bias is false and Qwen3.* true only"),
        ("plain", {"mlp_bias": True, "use_qk_norm": True}, "mlp_bias is true and Qwen3ForCausalLM"),
    ],
)
def test_a_model_that_no_class_has_is_refused_in_one_line(variant, changes, message):
    fields = tiny_run(variant).model.model_dump(exclude={"attention_out_bias"})
    with pytest.raises(CheckpointError, match=message) as caught:
        hf_config(ModelConfig(**fields | changes), "float32")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("variant", "name", "expected"),
    [
        ("plain", "LlamaForCausalLM", {"attention_bias": False, "mlp_bias": False}),
        ("biases", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", "Qwen2ForCausalLM", {"use_sliding_window": False, "sliding_window": None}),
        ("qwen3", "Qwen3ForCausalLM", {"use_sliding_window": False, "attention_bias": False, "head_dim": 16}),
        ("head norms and biases", "Glm4MoeForCausalLM", {"use_qk_norm": True, "attention_bias": True}),
    ],
)
def test_the_model_chooses_its_class(variant, name, expected):
    config = hf_config(tiny_run(variant).model, "bfloat16")
    assert config["architectures"] == [name]
    assert {key: config[key] for key in expected} == expected
    assert "attention_out_bias" not in config
    if name.startswith("Qwen"):
        assert not {"mlp_bias", "use_qk_norm", "pretraining_tp"} & config.keys()
    if name == "Qwen2ForCausalLM":
        assert "attention_bias" not in config


def described(architecture, **changes) -> dict[str, Any]:
    """config.json of a tiny model as that class's own checkpoints have it."""
    sizes = tiny_run("plain").model.model_dump(include={*architecture.required, "num_key_value_heads"})
    context = {"max_position_embeddings": 64}
    return {"architectures": [architecture.name], **sizes, **context, "head_dim": 8, **changes}


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        (MISTRAL, {"sliding_window": None}),
        (MISTRAL, {"sliding_window": 64}),
        (MISTRAL, {}),  # 4096
        (QWEN2, {"use_sliding_window": False, "sliding_window": 32}),
        (QWEN3, {"sliding_window": 32, "layer_types": ["full_attention", "full_attention"]}),
        (QWEN3, {"use_sliding_window": True, "sliding_window": 64}),
        (LLAMA, {"sliding_window": 32}),  # which it does not look at
    ],
    ids=str,
)
def test_a_window_as_long_as_the_context_is_none(architecture, changes):
    model = model_config(described(architecture, **changes), "config.json")
    assert model.use_qk_norm is (architecture is QWEN3)
    assert (model.attention_bias, model.attention_out_bias) == (architecture is QWEN2, False)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        (MISTRAL, {"sliding_window": 32}, "sliding_window is 32, max_position_embeddings 64, and megalite"),
        (MISTRAL, {"max_position_embeddings": 4097}, "sliding_window is 4096, .* 4097"),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 32}, "set max_position_embeddings to 32"),
        (QWEN3, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is sliding_attention"),
    ],
    ids=str,
)
def test_a_window_within_the_context_is_refused(architecture, changes, message):
    with pytest.raises(CheckpointError, match=message):
        model_config(described(architecture, **changes), "config.json")


def test_a_shape_that_transformers_refuses_is_refused_here():
    model = ModelConfig(hidden_size=36, num_attention_heads=8, num_key_value_heads=8, head_dim=8)
    with pytest.raises(CheckpointError, match="hidden_size 36 is not divisible by num_attention_heads 8"):
        hf_config(model, "float32")
