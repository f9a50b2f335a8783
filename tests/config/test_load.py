import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.config.load import ConfigError, dump_run, known_keys, load_run
from megalite.config.run import RunConfig


def message(overrides, path=None):
    with pytest.raises(ConfigError) as caught:
        load_run(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def test_without_a_file_the_run_is_the_default():
    assert load_run(None, []) == RunConfig()


def test_a_file_changes_what_it_states_and_the_command_line_wins(tmp_path):
    path = write(tmp_path, "model:\n  hidden_size: 64\n  num_hidden_layers: 3\ndata:\nseed: 7\n")
    run = load_run(path, ["model.hidden_size=32", "model.hidden_size=48", "seed=8"])
    assert (run.model.hidden_size, run.model.num_hidden_layers, run.seed) == (48, 3, 8)
    assert run.data == RunConfig().data


def test_a_run_survives_being_written_and_read(tmp_path):
    overrides = [
        "model.rope_scaling={rope_type: linear, factor: 2}",
        "output_dir='1e5'",
        "data.train=on",
        "data.tokenizer='null'",
        "optimizer.epsilon=1e-20",
    ]
    run = load_run(None, overrides)
    assert (run.output_dir, run.data.train, run.data.tokenizer) == ("1e5", ["on"], "null")
    assert load_run(write(tmp_path, dump_run(run)), []) == run
    assert load_run(write(tmp_path, dump_run(run)), ["seed=1"]) != run


@settings(deadline=None)
@given(st.text(min_size=1))
def test_any_text_survives_being_written_and_read(tmp_path_factory, text):
    run = RunConfig(output_dir=text)
    path = tmp_path_factory.mktemp("run") / "run.yaml"
    path.write_text(dump_run(run), encoding="utf-8")
    assert load_run(str(path)).output_dir == text


def test_numbers_may_be_written_with_an_exponent():
    assert load_run(None, ["optimizer.learning_rate=5e-4"]).optimizer.learning_rate == 5e-4


def test_an_override_replaces_a_part_or_the_whole_of_a_section(tmp_path):
    path = write(tmp_path, "model:\n  rope_scaling: {rope_type: linear, factor: 2}\n")
    assert load_run(path, ["model.rope_scaling.factor=4"]).model.rope_scaling.factor == 4
    assert load_run(path, ["model.rope_scaling=null"]).model.rope_scaling is None
    with pytest.raises(ConfigError, match=r"factor: expected a value"):  # what null took away does not return
        load_run(path, ["model.rope_scaling=null", "model.rope_scaling.rope_type=linear"])
    scaled = load_run(None, ["model.rope_scaling.rope_type=linear", "model.rope_scaling.factor=8"])
    assert scaled.model.rope_scaling.factor == 8


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("model.hiden_size=3", "'model.hiden_size' on the command line: did you mean 'model.hidden_size'?"),
        ("tp_size=2", "did you mean 'parallel.tp_size'?"),
        ("optimizer.min_learning_rate=1", "did you mean 'schedule.min_learning_rate'?"),
        ("model.rope_scaling.rope_typ=linear", "did you mean 'model.rope_scaling.rope_type'?"),
        ("schedule.qqqq=1", "known here are num_steps, decay, warmup_steps, decay_steps, min_learning_rate"),
        ("modell=1", "did you mean 'model'?"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_refused_with_the_nearest_known_one(override, suggestion):
    assert suggestion in message([override])


def test_an_unknown_key_in_a_file_names_the_file(tmp_path):
    path = write(tmp_path, "paralel:\n  tp_size: 2\n")
    assert message([], path) == f"unknown key 'paralel.tp_size' in {path}: did you mean 'parallel.tp_size'?"


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("model.hidden_size=wide", '"wide": expected a whole number (on the command line)'),
        ("schedule.num_steps=1.5", "schedule.num_steps is 1.5: expected a whole number"),
        ("schedule.num_steps=true", "schedule.num_steps is true: expected a whole number"),
        ("schedule.num_steps='3'", 'schedule.num_steps is "3": expected a whole number'),
        ("schedule.num_steps=0", "schedule.num_steps is 0: expected a number greater than 0"),
        ("optimizer.beta1=1.0", "optimizer.beta1 is 1.0: expected a number less than 1"),
        ("optimizer.epsilon=.inf", "expected a finite number"),
        ("optimizer.name=moun", "expected one of 'adamw' or 'muon'"),
        ("optimizer.muon.coefficients=jordan", "one of 'classic', 'quintic' or 'polar_express'"),
        ("optimizer={name: muon, muon: {coefficients: quintic, num_iterations: 7}}", "7 exceeds the 5"),
        ("optimizer.muon.momentum=0.9", "name 'adamw' has no use for the settings of muon: set name=muon"),
        ("parallel.recompute=on", "expected one of 'none', 'selective' or 'full'"),
        ("checkpoint.resume=yes", 'checkpoint.resume is "yes": expected true or false'),
        ("output_dir=3", "output_dir is 3: expected text (put it in quotes)"),
        ("model.mlp_bias=1", "model.mlp_bias is 1: expected true or false"),
        ("model=3", "model is 3: expected a section"),
        ("data.train=[]", "no prefix given, expected at least 1"),
        ("data.split=1,2", "'1,2' is not three weights"),
        ("data.split=0,0,0", "is not three weights"),
        ("model.rope_scaling.factor=2", "model.rope_scaling.rope_type: expected a value"),
        ("schedule.min_learning_rate=1", "min_learning_rate 1.0 exceeds optimizer.learning_rate 0.001"),
        ("model.hidden_size", "'model.hidden_size' is not understood: expected section.key=value"),
        ("seed=[", "not valid YAML"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_in_one_line(override, text):
    assert text in message([override])


def test_every_mistake_is_told_with_the_place_that_states_it(tmp_path):
    path = write(tmp_path, "model:\n  hidden_size: wide\n")
    text = message(["seed=-1"], path)
    assert f'model.hidden_size is "wide": expected a whole number (in {path})' in text
    assert "seed is -1: expected a number of at least 0 (on the command line)" in text


@pytest.mark.parametrize(
    ("key", "owner"),
    [
        ("train_batch_size", "train_batch_size"),
        ("data.batch_size", "train_batch_size"),
        ("data.micro_batch_size", "train_micro_batch_size_per_gpu"),
        ("optimizer.gradient_clipping", "gradient_clipping"),
        ("parallel.zero_stage", "zero_optimization"),
        ("bf16.enabled", "bf16"),
    ],
)
def test_a_fact_of_the_deepspeed_json_is_refused_and_both_places_are_named(tmp_path, key, owner):
    text = message([f"{key}=1"])
    assert text.startswith(
        f"stated in two places: '{key}' on the command line and '{owner}' in the DeepSpeed"
    )
    path = write(tmp_path, f"{key.replace('.', ': {')}: 1{'}' * key.count('.')}\n")
    with pytest.raises(
        ConfigError, match=rf"'{key}' in \S+run.yaml and '{owner}' in ds.json; remove the first"
    ):
        load_run(path, [], "ds.json")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("seed: 1\nseed: 2\n", "run.yaml, line 2: not valid YAML: 'seed' is stated twice"),
        ("model: {a: [}\n", "run.yaml, line 1: not valid YAML"),
        ("- 1\n", "expected sections of 'key: value' lines"),
        ("\x00", "not valid YAML"),
        ("? [a]\n: 1\n", "not valid YAML"),
    ],
)
def test_a_broken_file_is_told_in_one_line(tmp_path, content, text):
    assert text in message([], write(tmp_path, content))


def test_a_missing_file_and_a_folder_are_told_in_one_line(tmp_path):
    assert message([], "no/such.yaml") == "run configuration no/such.yaml not found: check --config"
    assert "cannot be read" in message([], str(tmp_path))


def test_every_field_is_documented():
    silent = [key for key, field in known_keys().items() if not field.description]
    assert silent == []


def test_configuration_is_importable_without_torch():
    block = "import sys; sys.modules['torch'] = None; import {}"
    run = [sys.executable, "-c"]
    config = (
        "megalite.config.load, megalite.config.deepspeed, megalite.model.flops, megalite.training.lr_schedule"
    )
    assert subprocess.run([*run, block.format(config)], check=False).returncode == 0
    blocked = subprocess.run([*run, block.format("torch")], check=False, capture_output=True)
    assert blocked.returncode != 0
