"""Every configuration that is shipped is read, and says what its name says."""

import re
from pathlib import Path

import pytest

from megalite.config.deepspeed import load_deepspeed
from megalite.config.load import load_run
from megalite.config.model import ModelConfig
from megalite.config.run import RunConfig
from megalite.model.flops import num_active_parameters, num_parameters
from megalite.tokenizer.template import open_template, shipped_templates
from megalite.tokenizer.tokenizer import HuggingFaceTokenizer
from megalite.tokenizer.train import LILLM_TOKENS, train_byte_bpe

CONFIGS = Path(__file__).parent.parent / "configs"
RUNS = sorted(CONFIGS.glob("runs/*.yaml"))
DEEPSPEED = sorted(CONFIGS.glob("deepspeed/*.json"))
VARIANTS = {path.stem: path for path in DEEPSPEED if path.stem.startswith("zero")}

PARAMETERS = {
    "demo": 918_144,
    "chat_1m": 918_656,
    "laptop_2m": 2_016_960,
    "lillm_39m": 39_596_544,
    "lillm_300m": 291_554_304,
    "lightlm_ffn": 146_833_920,
    "lightlm_attn": 146_975_296,
    "lightlm_moe": 143_966_592,
    "pretrain_460m": 461_685_760,
    "tinyllama_1.1b": 1_100_048_384,
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "moe_16b": 16_375_728_128,
    "llama3_70b": 70_553_706_496,
}
TUNED = {  # (task, the run whose model it goes on with)
    "chat_1m_sft": ("finetune", "chat_1m"),
    "chat_1m_dpo": ("prefer", "chat_1m_sft"),
    "lillm_39m_sft": ("finetune", "lillm_39m"),
    "lillm_39m_dpo": ("prefer", "lillm_39m_sft"),
}
ACTIVE_PARAMETERS = {"lightlm_moe": 106_217_856, "moe_16b": 2_828_650_496}  # the second is published as 2.8B
# Tokens of one step and of the whole run; the comment in the YAML says which of them are published.
TOKENS = {
    "lillm_39m": (524_288, 7_864_320_000),
    "lillm_39m_sft": (262_144, 655_360_000),
    "lightlm_ffn": (245_760, 27_999_928_320),
    "pretrain_460m": (196_608, 98_240_888_832),
    "tinyllama_1.1b": (2_097_152, 3_000_001_101_824),
    "llama2_7b": (4_194_304, 1_999_999_336_448),
    "llama3_8b": (4_194_304, 15_000_001_314_816),
    "llama3_70b": (4_194_304, 15_000_001_314_816),
    "moe_16b": (18_874_368, 2_009_157_599_232),
}


def test_every_variant_is_found():
    assert len(VARIANTS) == 10


def parameters_by_hand(model: ModelConfig) -> int:
    """The count of a model from its shape alone, without a table of tensors."""
    width, head = model.hidden_size, model.head_dim
    ends = (1 if model.tie_word_embeddings else 2) * model.vocab_size * width + width
    attention = 2 * width * head * (model.num_attention_heads + model.num_key_value_heads)
    each_layer = model.num_hidden_layers * (attention + 2 * width)
    routed = model.n_routed_experts
    num_dense = model.first_k_dense_replace if routed else model.num_hidden_layers
    dense = num_dense * 3 * width * model.intermediate_size
    experts = 3 * width * model.moe_intermediate_size * (routed + model.n_shared_experts) if routed else 0
    return ends + each_layer + dense + (model.num_hidden_layers - num_dense) * (experts + routed * width)


def shipped_run(name: str) -> RunConfig:
    """The run of that name; one that goes on with another has the model of that."""
    run = load_run(str(CONFIGS / f"runs/{name}.yaml"), [])
    return run.model_copy(update={"model": shipped_run(TUNED[name][1]).model}) if name in TUNED else run


def num_gpus(path: Path) -> int | None:
    """The GPUs that the first comment of a run names."""
    named = re.match(r"(?:#.*\n)*?#.* on (\d+) A100", path.read_text(encoding="utf-8"))
    return int(named[1]) if named else None


def test_every_run_has_its_count_or_goes_on_with_the_model_of_one_that_has():
    assert sorted([*PARAMETERS, *TUNED]) == [path.stem for path in RUNS]


@pytest.mark.parametrize("name", TUNED)
def test_a_tuned_run_goes_on_with_the_model_of_another(name):
    """Its shape is that of its start, which has to take its layout and samples."""
    task, start = TUNED[name]
    run = load_run(str(CONFIGS / f"runs/{name}.yaml"), [])
    assert (run.task, run.checkpoint.start_from) == (task, f"runs/{start}")
    assert not {"model", "tokenizer"} & (run.model_fields_set | run.data.model_fields_set)
    model = shipped_run(name).model
    shipped_run(name).check_tensor_parallel(run.parallel.tp_size)
    assert model.num_hidden_layers % run.parallel.pp_size == 0
    assert run.data.seq_length <= model.max_position_embeddings


@pytest.mark.parametrize("name", TUNED)
def test_a_tuned_run_names_a_chat_template_that_is_there(name):
    template = load_run(str(CONFIGS / f"runs/{name}.yaml"), []).data.chat_template
    assert template in shipped_templates() or (CONFIGS.parent / template).is_file()


def test_the_template_of_lillm_frames_a_conversation_as_its_authors_do(monkeypatch):
    """The example of its README, and the tokens of which the loss is taken: the answer, to its end."""
    monkeypatch.chdir(CONFIGS.parent)
    tokenizer = HuggingFaceTokenizer(train_byte_bpe(["a"], 272, LILLM_TOKENS), "lillm", "</s>")
    name = load_run("configs/runs/lillm_39m_sft.yaml", []).data.chat_template
    template = open_template(tokenizer, name)
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Paris."}]
    text = template.render(messages)
    assert text == "<r0>user<r1>What?</r2><r0>assistant<r1>Paris.</s>"
    ids, is_learnt = template.encode(messages)
    assert (
        tokenizer.decode([token for token, learnt in zip(ids, is_learnt, strict=True) if learnt])
        == "Paris.</s>"
    )
    assert text.startswith(template.render(messages[:1], add_generation_prompt=True))


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_run_has_the_parameters_of_its_model(name):
    model = load_run(str(CONFIGS / f"runs/{name}.yaml"), []).model
    assert num_parameters(model) == parameters_by_hand(model) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_token_passes_through_so_many_parameters(name):
    model = load_run(str(CONFIGS / f"runs/{name}.yaml"), []).model
    assert num_active_parameters(model) == ACTIVE_PARAMETERS.get(name, PARAMETERS[name])


@pytest.mark.parametrize("name", TOKENS)
def test_a_run_takes_the_tokens_of_its_recipe(name):
    run = load_run(str(CONFIGS / f"runs/{name}.yaml"), [])
    batch = load_deepspeed(str(CONFIGS / f"deepspeed/{name}.json"))
    tokens = batch.train_batch_size * run.data.seq_length
    assert (tokens, tokens * run.schedule.num_steps) == TOKENS[name]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_run_fits_the_gpus_that_its_comment_names(path):
    run = shipped_run(path.stem)
    dp_size = run.dp_size_of(num_gpus(path) or run.parallel.tp_size * run.parallel.pp_size)
    if num_gpus(path):
        load_deepspeed(str(CONFIGS / f"deepspeed/{path.stem}.json")).num_micro_batches(dp_size)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_run_writes_to_a_folder_of_its_name_and_its_comment_names_it(path):
    text = path.read_text(encoding="utf-8")
    assert load_run(str(path), []).output_dir == f"runs/{path.stem}"
    assert path.stem in text.partition("\n\n")[0]


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
    model = load_run(str(CONFIGS / "runs/pretrain_460m.yaml"), []).model
    assert (model.rope_theta, model.rms_norm_eps, model.eos_token_id) == (1e4, 1e-6, 50256)


@pytest.mark.parametrize("tp_size", [1, 2, 8])
@pytest.mark.parametrize("pp_size", [1, 2])
@pytest.mark.parametrize("dp_size", [1, 2, 4, 8, 16])
def test_the_460m_run_fits_one_to_sixteen_replicas(tp_size, pp_size, dp_size):
    overrides = [f"parallel.tp_size={tp_size}", f"parallel.pp_size={pp_size}"]
    load_run(str(CONFIGS / "runs/pretrain_460m.yaml"), overrides).dp_size_of(tp_size * pp_size * dp_size)
    batch = load_deepspeed(str(CONFIGS / "deepspeed/pretrain_460m.json"))
    assert batch.num_micro_batches(dp_size) == 16 // dp_size
