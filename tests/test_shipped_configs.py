"""Every configuration that is shipped is read, and says what its name says."""

import re
from pathlib import Path

import pytest

from megalite.config.deepspeed import load_deepspeed
from megalite.config.load import load_run
from megalite.model.flops import num_parameters

CONFIGS = Path(__file__).parent.parent / "configs"
RUNS = sorted(CONFIGS.glob("runs/*.yaml"))
DEEPSPEED = sorted(CONFIGS.glob("deepspeed/*.json"))
VARIANTS = {path.stem: path for path in DEEPSPEED if path.stem.startswith("zero")}


def test_every_folder_is_found():
    assert "pretrain_460m" in [path.stem for path in RUNS]
    assert len(VARIANTS) == 10


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_run_is_read_and_fits_one_process(path):
    load_run(str(path), []).dp_size_of(1)


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_every_deepspeed_json_is_read_and_states_what_deepspeed_would_assume(path):
    config = load_deepspeed(str(path))
    assert config.gradient_clipping == 1.0
    assert {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping"} <= config.raw.keys()
    assert not config.raw["zero_optimization"].get("overlap_comm") or config.zero_stage >= 2
    if config.precision == "bf16":
        assert config.grad_accum_dtype == "fp32"


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_what_its_name_says(name):
    stage, precision = re.fullmatch(r"zero(\d)(?:_(\w+))?", name).groups()
    config = load_deepspeed(str(VARIANTS[name]))
    assert (config.zero_stage, config.precision) == (int(stage), precision or "fp32")
    assert [config.num_micro_batches(dp_size) for dp_size in (1, 2, 4, 8)] == [8, 4, 2, 1]


def test_the_460m_run_is_lite_llama():
    run = load_run(str(CONFIGS / "runs/pretrain_460m.yaml"), [])
    batch = load_deepspeed(str(CONFIGS / "deepspeed/pretrain_460m.json"))
    assert num_parameters(run.model) == 461_685_760
    assert (run.model.rope_theta, run.model.rms_norm_eps, run.model.eos_token_id) == (1e4, 1e-6, 50256)
    assert run.schedule.num_steps * batch.train_batch_size * run.data.seq_length == 98_240_888_832


def test_the_laptop_run_has_two_million_parameters():
    run = load_run(str(CONFIGS / "runs/laptop_2m.yaml"), [])
    embedding, layers = 2048 * 192, 4 * (2 * 192 * 6 * 32 + 2 * 192 * 3 * 32 + 3 * 192 * 512 + 2 * 192)
    assert num_parameters(run.model) == embedding + layers + 192 == 2_016_960


@pytest.mark.parametrize("tp_size", [1, 2, 8])
@pytest.mark.parametrize("pp_size", [1, 2])
@pytest.mark.parametrize("dp_size", [1, 2, 4, 8, 16])
def test_the_460m_run_fits_one_to_sixteen_replicas(tp_size, pp_size, dp_size):
    overrides = [f"parallel.tp_size={tp_size}", f"parallel.pp_size={pp_size}"]
    load_run(str(CONFIGS / "runs/pretrain_460m.yaml"), overrides).dp_size_of(tp_size * pp_size * dp_size)
    batch = load_deepspeed(str(CONFIGS / "deepspeed/pretrain_460m.json"))
    assert batch.num_micro_batches(dp_size) == 16 // dp_size
