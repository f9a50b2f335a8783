import json

import pytest

from megalite.config.deepspeed import DeepSpeedConfig, load_deepspeed
from megalite.config.load import ConfigError

PLAIN = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2},
}


@pytest.fixture
def load(tmp_path):
    def load(without=(), **changes):
        path = tmp_path / "ds.json"
        facts = {key: value for key, value in {**PLAIN, **changes}.items() if key not in without}
        path.write_text(json.dumps(facts))
        return load_deepspeed(str(path), "run.yaml")

    return load


def test_the_facts_are_read_and_the_whole_is_kept(load):
    config = load(bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"}, steps_per_print=5)
    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu) == (16, 2)
    assert (config.gradient_clipping, config.zero_stage) == (1.0, 2)
    assert (config.precision, config.grad_accum_dtype) == ("bf16", "fp32")
    assert config.raw["steps_per_print"] == 5


def test_zero_is_off_and_precision_is_fp32_unless_stated(load):
    config = load(without=["zero_optimization"], bf16={"enabled": False})
    assert (config.zero_stage, config.precision, config.grad_accum_dtype) == (0, "fp32", None)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"optimizer": {}}, "stated in two places: 'optimizer' in {path} and 'optimizer' in run.yaml"),
        ({"scheduler": {}}, "'scheduler' in {path} and 'schedule' in run.yaml"),
        ({"activation_checkpointing": {}}, "and 'parallel.recompute' in run.yaml"),
        (
            {"zero_optimization": {"stage": 3, "stage3_max_reuse_distance": 0}},
            "'zero_optimization.stage3_max_reuse_distance' in {path} and 'parallel.parameter_gathering' in",
        ),
        (
            {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 0}},
            "and 'parallel.parameter_gathering' in run.yaml",
        ),
        ({"without": ["gradient_clipping"]}, "gradient_clipping: expected a value, which is required"),
        ({"without": ["train_batch_size"]}, "train_batch_size: expected a value"),
        ({"train_batch_size": "auto"}, 'train_batch_size is "auto": expected a whole number (in {path})'),
        ({"gradient_clipping": -1}, "gradient_clipping is -1: expected a number of at least 0"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4: expected one of 0, 1, 2 or 3"),
        ({"zero_optimization": True}, "zero_optimization is true: expected an object in braces"),
        ({"data_types": {"grad_accum_dtype": "float"}}, "data_types.grad_accum_dtype is \"float\""),
        ({"bf16": {"enabled": "auto"}}, 'bf16.enabled is "auto": expected true or false'),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16 and fp16 are both enabled"),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}, "set zero_optimization.stage to 1"),
        ({"fp16": {"enabled": True}, "without": ["zero_optimization"]}, "set zero_optimization.stage to 1"),
        ({"data_type": {}}, "unknown key 'data_type' in {path}: did you mean 'data_types'?"),
        ({"bfloat16": {"enabled": True}}, "unknown key 'bfloat16' in {path}: did you mean 'bf16'?"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_one_line(load, tmp_path, changes, text):
    with pytest.raises(ConfigError) as caught:
        load(**changes)
    assert text.format(path=tmp_path / "ds.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "line 1: not valid JSON"),
        ("[]", "expected an object"),
        ('{"bf16": {}, "bf16": {}}', "'bf16' is stated twice"),
    ],
)
def test_a_broken_file_is_told_in_one_line(tmp_path, content, text):
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=text):
        load_deepspeed(str(path))


def test_a_missing_file_is_told_in_one_line():
    with pytest.raises(
        ConfigError, match=r"^DeepSpeed configuration no.json not found: check --deepspeed_config$"
    ):
        load_deepspeed("no.json")


def config(**changes):
    facts = {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0}
    return DeepSpeedConfig(**{**facts, **changes})


def test_micro_batches_are_what_the_replicas_leave():
    assert [config().num_micro_batches(dp_size) for dp_size in (1, 2, 3, 12)] == [12, 6, 4, 1]
    assert config(gradient_accumulation_steps=6).num_micro_batches(2) == 6


def test_a_batch_that_does_not_divide_is_refused_with_the_numbers():
    with pytest.raises(ConfigError, match=r"train_batch_size 24 is not divisible by .* 2 x 5 .* = 10"):
        config().num_micro_batches(5)


def test_accumulation_steps_that_contradict_the_batch_are_refused_with_the_numbers():
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps 3 contradicts .* 24 / .* = 6"):
        config(gradient_accumulation_steps=3).num_micro_batches(2)
