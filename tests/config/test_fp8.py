"""Sizes that fp8 does not multiply are told before anything starts."""

import pytest

from megalite.config.fp8 import Fp8Config
from megalite.config.model import ModelConfig
from megalite.config.section import ConfigError

FITS = ModelConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)  # heads of 16
EXPERTS = FITS.model_copy(
    update={
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,  # of routed experts it may be anything
        "n_shared_experts": 2,
        "first_k_dense_replace": 0,
    }
)


def check(model, tp_size=1, tokens=64, recipe="rowwise"):
    Fp8Config(recipe=recipe).check_sizes(model, tp_size, tokens)


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_multiples_of_16_on_each_rank_are_taken(tp_size):
    """Eight ranks have 16 of 128 inner features each; of heads it is four that have any."""
    check(FITS.model_copy(update={"num_attention_heads": 8, "head_dim": 16}), tp_size)


@pytest.mark.parametrize(
    ("changes", "tp_size", "line"),
    [
        ({"hidden_size": 72}, 1, "model.hidden_size makes 72: change it, or set fp8.recipe=none"),
        (
            {"intermediate_size": 96},
            4,
            "model.intermediate_size makes 24 on each of parallel.tp_size 4",
        ),
        ({"head_dim": 24}, 4, "num_attention_heads x head_dim makes 24 on each of parallel.tp_size 4"),
        ({"head_dim": 8}, 2, "num_key_value_heads x head_dim makes 8 on each of parallel.tp_size 2"),
    ],
)
def test_a_size_that_is_none_is_named_with_both_numbers(changes, tp_size, line):
    with pytest.raises(ConfigError, match=f"^fp8.recipe rowwise needs multiples of 16 and .*{line}"):
        check(FITS.model_copy(update=changes), tp_size)
    check(FITS.model_copy(update=changes), tp_size, recipe="none")


def test_tokens_of_a_micro_batch_count_where_weights_gradients_are_rounded():
    for recipe in ("tensorwise", "rowwise"):
        with pytest.raises(ConfigError, match=r"has 40 tokens on a rank: .*recipe=rowwise_with_gw_hp"):
            check(FITS, tokens=40, recipe=recipe)
    check(FITS, tokens=40, recipe="rowwise_with_gw_hp")


def test_of_experts_the_shared_ones_count():
    check(EXPERTS)
    with pytest.raises(ConfigError, match="moe_intermediate_size x n_shared_experts makes 24"):
        check(EXPERTS.model_copy(update={"n_shared_experts": 1}))
    check(EXPERTS.model_copy(update={"n_shared_experts": 0, "intermediate_size": 100}))
    with pytest.raises(ConfigError, match="intermediate_size makes 100"):
        check(EXPERTS.model_copy(update={"first_k_dense_replace": 1, "intermediate_size": 100}))


def test_fp16_is_refused_in_one_line():
    with pytest.raises(
        ConfigError, match=r"^fp8.recipe rowwise rounds bf16 and .* says fp16: enable bf16 .*$"
    ):
        Fp8Config(recipe="rowwise").check_precision("fp16")
    for recipe, precision in (("rowwise", "bf16"), ("rowwise", "fp32"), ("none", "fp16")):
        Fp8Config(recipe=recipe).check_precision(precision)
