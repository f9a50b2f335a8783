import copy
import itertools
import json
import re

import pytest
from deepspeed.runtime.config import DeepSpeedConfig as DeepSpeed

from megalite.config.batch import BatchSizes
from megalite.config.deepspeed import DeepSpeedConfig, deepspeed_config_from, load_deepspeed
from megalite.config.load import ConfigError

PLAIN = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2},
}


DP_SIZE, HIDDEN_SIZE = 2, 192


@pytest.fixture
def load(tmp_path):
    def load(without=(), **changes):
        path = tmp_path / "ds.json"
        facts = {key: value for key, value in {**PLAIN, **changes}.items() if key not in without}
        path.write_text(json.dumps(facts))
        return load_deepspeed(str(path), "run.yaml", dp_size=DP_SIZE, hidden_size=HIDDEN_SIZE)

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
        ({"train_batch_size": "16"}, 'train_batch_size is "16": expected a whole number (in {path})'),
        ({"train_batch_size": 16.0}, "train_batch_size is 16.0: expected a whole number (in {path})"),
        ({"train_micro_batch_size_per_gpu": 0}, "_per_gpu is 0: expected a number greater"),
        ({"gradient_accumulation_steps": True}, "steps is true: expected a whole number"),
        ({"gradient_clipping": None}, "gradient_clipping is null: expected a number"),
        ({"gradient_clipping": -1}, "gradient_clipping is -1: expected a number of at least 0"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4: expected one of 0, 1, 2 or 3"),
        ({"zero_optimization": True}, "zero_optimization is true: expected an object in braces"),
        ({"data_types": {"grad_accum_dtype": "float"}}, "data_types.grad_accum_dtype is \"float\""),
        ({"bf16": {"enabled": "auto"}}, 'bf16.enabled is "auto": expected true or false, as nothing'),
        ({"bf16": {"enabled": "yes"}}, 'bf16.enabled is "yes": expected true or false (in {path})'),
        ({"zero_optimization": {"stage": "auto"}}, 'zero_optimization.stage is "auto": expected one of'),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "auto"}}},
            'zero_optimization.offload_optimizer.device is "auto" in {path}: nothing else decides it',
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
            'zero_optimization.offload_optimizer is {{"device": "cpu"}} in {path}: masters and moments',
        ),
        (
            {"bf16": {"enabled": True, "bf16_optimizer_states": True}, "zero_optimization": {"stage": 1}},
            "bf16.bf16_optimizer_states is true in {path}: masters and moments are fp32, on the device",
        ),
        ({"fp16": {"loss_scale": "auto"}}, 'fp16.loss_scale is "auto" in {path}: nothing else decides it'),
        ({"odd": [1, {"x": "auto"}]}, 'odd.1.x is "auto" in {path}: nothing else decides it'),
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


def theirs(dp_size, sizes):
    """The three sizes as DeepSpeed derives them from those that are stated; None where it refuses them."""
    stated = {name: sizes.get(name) for name in BatchSizes.model_fields}
    config = DeepSpeed.__new__(DeepSpeed)
    vars(config).update(stated, world_size=dp_size)
    try:
        config._configure_train_batch_size()
    except AssertionError:
        return None
    return tuple(getattr(config, name) for name in stated)


def ours(dp_size, sizes):
    """The same by megalite."""
    try:
        config = deepspeed_config_from(sizes, "a test", dp_size=dp_size)
        steps = config.num_micro_batches(dp_size)
    except ConfigError as error:
        assert "\n" not in str(error)
        return None
    assert config.raw.get("gradient_accumulation_steps", steps) == steps
    batch, micro = (config.raw[name] for name in list(BatchSizes.model_fields)[:2])
    assert (batch, micro) == (config.train_batch_size, config.train_micro_batch_size_per_gpu)
    return batch, micro, steps


@pytest.mark.parametrize("absent", [{}, None, "auto"])
@pytest.mark.parametrize("dp_size", [1, 2, 3, 8])
def test_batch_sizes_are_derived_or_refused_as_by_deepspeed(dp_size, absent):
    outcomes = []
    for values in itertools.product((None, 16, 24), (None, 2, 3), (None, 1, 4, 12)):
        stated = {name: n for name, n in zip(BatchSizes.model_fields, values, strict=True) if n is not None}
        left_out = {} if absent == {} else dict.fromkeys(BatchSizes.model_fields, absent)
        outcomes.append((theirs(dp_size, stated), ours(dp_size, left_out | stated)))
    assert [ours for _, ours in outcomes] == [theirs for theirs, _ in outcomes]
    assert len({ours for _, ours in outcomes}) > 5 and (None, None) in outcomes


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({}, "neither train_batch_size nor train_micro_batch_size_per_gpu is a number in a test: state"),
        ({"train_batch_size": "auto", "gradient_accumulation_steps": 4}, "neither train_batch_size nor"),
        ({"train_batch_size": 16}, "train_batch_size 16 is not divisible by 3 data-parallel ranks: change"),
        (
            {"train_batch_size": 16, "gradient_accumulation_steps": 2},
            "16 is not divisible by gradient_accumulation_steps 2 x 3 data-parallel ranks = 6: change one of",
        ),
    ],
)  # fmt: skip
def test_batch_sizes_that_do_not_suffice_or_fit_are_told_in_one_line(sizes, text):
    with pytest.raises(ConfigError, match=re.escape(text)) as caught:
        deepspeed_config_from(sizes, "a test", dp_size=3)
    assert "\n" not in str(caught.value)


def test_before_the_launch_two_batch_sizes_must_be_stated():
    text = "train_batch_size follows from the number of data-parallel ranks, .* state it in a test$"
    with pytest.raises(ConfigError, match=text):
        deepspeed_config_from({"train_micro_batch_size_per_gpu": 2}, "a test")
    sizes = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2}
    assert deepspeed_config_from(sizes, "a test").num_micro_batches(4) == 2


def test_objects_without_the_fact_that_is_read_are_taken(load):
    config = load(zero_optimization={"overlap_comm": False}, data_types={}, bf16={})
    assert (config.zero_stage, config.grad_accum_dtype, config.precision) == (0, None, "fp32")
    assert config.raw["zero_optimization"] == {"overlap_comm": False}


@pytest.mark.parametrize("clipping", [{}, {"gradient_clipping": "auto"}])
def test_gradients_are_clipped_to_1_unless_stated_and_deepspeed_is_told(load, clipping):
    config = load(without=[] if clipping else ["gradient_clipping"], **clipping)
    assert (config.gradient_clipping, config.raw["gradient_clipping"]) == (1.0, 1.0)
    assert load(gradient_clipping=0.0).raw["gradient_clipping"] == 0


def test_auto_bucket_sizes_are_those_of_the_hugging_face_trainer(load):
    """The numbers follow transformers' trainer_config_finalize in integrations/deepspeed.py."""
    names = ["reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"]
    zero = load(zero_optimization={"stage": 3, **dict.fromkeys(names, "auto")}).raw["zero_optimization"]
    assert zero == {"stage": 3, **dict(zip(names, (36864, 33177, 1920), strict=True))}
    assert all(type(size) is int for size in zero.values())
    stated = {"stage": 3, **dict.fromkeys(names, 7)}
    assert load(zero_optimization=stated).raw["zero_optimization"] == stated
    assert load(zero_optimization={"stage": 3}).raw["zero_optimization"] == {"stage": 3}


def test_without_a_model_bucket_sizes_are_not_decided():
    raw = {**PLAIN, "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}
    with pytest.raises(ConfigError, match=r'zero_optimization\.reduce_bucket_size is "auto" in a test'):
        deepspeed_config_from(raw, "a test")


def test_deepspeeds_own_auto_is_left_to_its_default(load):
    types = {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": "auto"}
    assert load(data_types=types).raw["data_types"] == {"grad_accum_dtype": "fp32"}


def test_what_was_given_is_not_changed():
    raw = {
        "train_batch_size": 8,
        "gradient_clipping": "auto",
        "zero_optimization": {"reduce_bucket_size": "auto"},
    }
    before = copy.deepcopy(raw)
    deepspeed_config_from(raw, "a test", dp_size=2, hidden_size=8)
    assert raw == before


def test_what_is_filled_in_says_the_same_when_it_is_read_again(load):
    first = load(without=["train_micro_batch_size_per_gpu"], gradient_accumulation_steps=4)
    assert (first.train_micro_batch_size_per_gpu, first.num_micro_batches(DP_SIZE)) == (2, 4)
    assert deepspeed_config_from(first.raw, "the run's folder") == first


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
