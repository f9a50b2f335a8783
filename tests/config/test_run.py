import pytest
from pydantic import ValidationError

from megalite.config.load import ConfigError, load_run
from megalite.config.model import ModelConfig
from megalite.config.run import DataConfig, RunConfig

CASES = [
    (["parallel.tp_size=2", "parallel.pp_size=3"], 8, ["8 processes", "tp_size 2 x pp_size 3", "of 6"]),
    (["parallel.tp_size=3"], 3, ["model.num_attention_heads 8", "parallel.tp_size 3"]),
    (["parallel.tp_size=4", "model.intermediate_size=642"], 4, ["model.intermediate_size 642", "tp_size 4"]),
    (
        ["parallel.tp_size=4", "model.num_attention_heads=12", "model.num_key_value_heads=6"],
        4,
        ["model.num_key_value_heads 6", "parallel.tp_size 4"],
    ),
    (["data.seq_length=257"], 1, ["data.seq_length 257", "model.max_position_embeddings 256"]),
    (["data.seq_length=127", "parallel.tp_size=2"], 2, ["data.seq_length 127", "tp_size 2", "l=false"]),
    (["parallel.pp_size=5"], 5, ["parallel.pp_size 5", "model.num_hidden_layers 4"]),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "world_size", "parts"), CASES)
def test_a_layout_that_does_not_fit_is_refused_with_both_numbers(overrides, world_size, parts):
    with pytest.raises(ConfigError) as caught:
        load_run(None, overrides).dp_size_of(world_size)
    assert all(part in str(caught.value) for part in parts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        ([], 1),
        ([], 7),
        (["parallel.tp_size=2", "parallel.pp_size=2"], 8),
        (["parallel.tp_size=8"], 8),  # each key-value head on two ranks
        (["parallel.pp_size=4"], 4),
        (["data.seq_length=127", "parallel.tp_size=2", "parallel.sequence_parallel=false"], 2),
    ],
)
def test_a_layout_that_fits_is_accepted(overrides, world_size):
    load_run(None, overrides).dp_size_of(world_size)


def test_null_heads_and_width_follow_the_query_heads():
    config = ModelConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=None, head_dim=None)
    assert (config.num_key_value_heads, config.head_dim) == (6, 16)
    assert (
        ModelConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=3, head_dim=32).head_dim == 32
    )


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"hidden_size": 190}, "hidden_size 190 is not divisible by num_attention_heads 8"),
        ({"num_key_value_heads": 3}, "num_attention_heads 8 is not divisible by num_key_value_heads 3"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"eos_token_id": 257}, "eos_token_id 257 is outside the vocabulary of vocab_size 257"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "needs low_freq_factor, high_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8, "low_freq_factor": 1}}, "takes no low_freq"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8}}, "'linear' or 'llama3'"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_fit_together_is_refused(fields, text):
    with pytest.raises(ValidationError, match=text):
        ModelConfig(**fields)


def test_a_refused_width_is_one_mistake_not_two():
    with pytest.raises(ConfigError) as caught:
        load_run(None, ["model.hidden_size=wide"])
    assert "head_dim" not in str(caught.value)


def test_one_prefix_may_be_given_without_a_list():
    assert DataConfig(train="a").train == ["a"]


def test_weights_stand_between_prefixes_as_they_were_written():
    run = load_run(None, ["data.train=[0.7, data/a, 30, data/b]"])
    assert run.data.train == ["0.7", "data/a", "30", "data/b"]
    assert DataConfig(train=run.data.train) == DataConfig(train=[0.7, "data/a", 30, "data/b"])
    with pytest.raises(ConfigError, match=r"data\.train"):
        load_run(None, ["data.train=[true, a]"])


def test_a_run_is_frozen():
    with pytest.raises(ValidationError):
        RunConfig().seed = 1
    with pytest.raises(ValidationError):
        RunConfig().model.hidden_size = 1
