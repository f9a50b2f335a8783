import pytest
from pydantic import ValidationError

from megalite.config.data import DataConfig
from megalite.config.load import ConfigError, load_run
from megalite.config.model import ModelConfig
from megalite.config.run import RunConfig

EXPERTS = ["model.n_routed_experts=8", "model.moe_intermediate_size=64"]
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
    (["parallel.cp_size=2", "parallel.tp_size=2"], 6, ["6 processes", "tp_size 2 x pp_size 1 x cp_size 2"]),
    (["parallel.cp_size=3"], 3, ["data.seq_length 128", "by 6, 2 chunks", "parallel.cp_size 3"]),
    (
        ["parallel.cp_size=2", "parallel.tp_size=4", "data.seq_length=124"],
        8,
        ["data.seq_length 124 / parallel.cp_size 2", "parallel.tp_size 4", "sequence_parallel=false"],
    ),
    (
        ["parallel.cp_size=4", "parallel.tp_size=4", "parallel.context_attention=heads"],
        16,
        ["num_attention_heads makes 2 on each of parallel.tp_size 4", "parallel.cp_size 4", "=gather"],
    ),
    (
        [
            *("parallel.cp_size=6", "data.seq_length=120", "parallel.context_attention=heads"),
            *("model.num_attention_heads=12", "model.num_key_value_heads=4"),
        ],
        6,
        ["num_key_value_heads makes 4 on each of parallel.tp_size 1", "parallel.cp_size 6"],
    ),
    ([*EXPERTS, "parallel.ep_size=4", "parallel.cp_size=2"], 6, ["parallel.ep_size 4", "ranks, 6"]),
    (["parallel.pp_size=5"], 5, ["parallel.pp_size 5", "model.num_hidden_layers 4"]),
    (["parallel.ep_size=2"], 2, ["parallel.ep_size 2", "model.n_routed_experts"]),
    ([*EXPERTS, "parallel.ep_size=3"], 3, ["parallel.ep_size 3", "model.n_routed_experts, 8"]),
    ([*EXPERTS, "parallel.ep_size=4"], 6, ["parallel.ep_size 4", "data-parallel ranks, 6"]),
    ([*EXPERTS, "parallel.ep_size=4", "parallel.tp_size=2"], 4, ["ep_size 4", "ranks, 2"]),
    ([*EXPERTS, "parallel.tp_size=8", "model.moe_intermediate_size=60"], 8, ["moe_intermediate_size 60"]),
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
        (["parallel.cp_size=4", "parallel.tp_size=2"], 16),
        (["parallel.cp_size=8", "parallel.context_attention=heads"], 8),  # copies of key-value heads
        ([*EXPERTS, "parallel.ep_size=4", "parallel.cp_size=2"], 4),  # over dp x cp
        ([*EXPERTS, "parallel.ep_size=4", "parallel.tp_size=2", "parallel.pp_size=2"], 16),
        (["data.seq_length=127", "parallel.tp_size=2", "parallel.sequence_parallel=false"], 2),
    ],
)
def test_a_layout_that_fits_is_accepted(overrides, world_size):
    load_run(None, overrides).dp_size_of(world_size)


WIDE = {"n_routed_experts": 4, "moe_intermediate_size": 8}


def test_experts_spread_over_ranks_need_zero_stage_3():
    run = load_run(None, [*EXPERTS, "parallel.ep_size=2"])
    run.check_zero_stage(3)
    for stage in (0, 1, 2):
        with pytest.raises(
            ConfigError, match=f"ep_size 2 needs ZeRO stage 3 and the DeepSpeed JSON says {stage}"
        ):
            run.check_zero_stage(stage)
    load_run(None, EXPERTS).check_zero_stage(0)


def test_the_quantile_rule_needs_a_choice():
    everything = ["model.num_experts_per_tok=8", "balancing.rule=quantile"]
    with pytest.raises(ConfigError, match="'quantile' has no choice: every token goes to all 8 experts"):
        load_run(None, [*EXPERTS, *everything])


def test_an_adapter_to_begin_with_needs_a_rank():
    with pytest.raises(ConfigError, match="start_from mine and rank 0: set rank to that of the adapter"):
        load_run(None, ["lora.start_from=mine"])
    assert load_run(None, ["lora.start_from=mine", "lora.rank=4"]).lora.start_from == "mine"


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
        ({"n_routed_experts": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 6}, "4 is fewer than"),
        ({"n_routed_experts": 4}, "n_routed_experts have no width"),
        ({"n_routed_experts": 4, "n_shared_experts": 1}, "n_shared_experts have no width: set moe_"),
        ({"n_shared_experts": 1}, "n_routed_experts 0: set n_routed_experts"),
        ({**WIDE, "first_k_dense_replace": 4}, "first_k_dense_replace 4 leaves no layer of"),
        ({**WIDE, "num_experts_per_tok": 1}, "the gate of num_experts_per_tok 1 is always 1"),
        ({**WIDE, "mlp_bias": True}, "experts have no biases: set mlp_bias=false"),
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


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["data.tokenizer=bytes"], "logging.evaluate_tasks"),
        (["logging.evaluate_tasks=[wikitext]", "data.train=corpus"], "data.tokenizer"),
    ],
)
def test_an_evaluation_needs_tasks_and_a_tokenizer(overrides, key):
    every = "logging.evaluate_every_steps=5"
    with pytest.raises(ConfigError, match=f"evaluate_every_steps is 5 and {key} names nothing: name it"):
        load_run(None, [every, *overrides])
    tasks = "logging.evaluate_tasks=[wikitext]"
    assert load_run(None, [every, tasks, "data.train=corpus", "data.tokenizer=bytes"])
    assert load_run(None, [every, tasks]).data.tokenizer is None  # the default data brings its own


def test_options_of_another_loss_are_refused():
    for option, loss in (("margin", "simpo"), ("desirable_weight", "kto"), ("undesirable_weight", "kto")):
        stated = f"preference.{option}=0.5"
        with pytest.raises(ConfigError, match=f"{option} 0.5 belongs to loss {loss}, and loss is dpo"):
            load_run(None, [stated])
        assert getattr(load_run(None, [stated, f"preference.loss={loss}"]).preference, option) == 0.5
    kto = load_run(None, ["task=prefer", "preference.loss=kto"])
    assert (kto.rows_per_sample, load_run(None, ["task=prefer"]).rows_per_sample) == (1, 2)
    assert load_run(None, ["preference.loss=kto"]).rows_per_sample == 1  # which another task does not use


def test_muon_and_adapters_are_refused():
    with pytest.raises(
        ConfigError, match=r"optimizer.name 'muon' .* lora.rank 8 .*: set optimizer.name=adamw"
    ):
        load_run(None, ["optimizer.name=muon", "lora.rank=8"])


@pytest.mark.parametrize("other", ["use_qk_norm", "attention_bias"])
def test_qk_clip_is_refused_where_logits_depend_on_more_than_weights(other):
    overrides = ["optimizer.name=muon", "optimizer.muon.qk_clip=100.0"]
    load_run(None, overrides).check_optimizer({})
    with pytest.raises(ConfigError, match=rf"optimizer.muon.qk_clip 100 .* model.{other} is true"):
        load_run(None, [*overrides, f"model.{other}=true"]).check_optimizer({})


def test_qk_clip_is_refused_where_no_rank_has_whole_sequences():
    overrides = ["optimizer.name=muon", "optimizer.muon.qk_clip=100.0", "parallel.cp_size=2"]
    with pytest.raises(ConfigError, match=r"whole sequences and parallel.cp_size is 2: set .*qk_clip=null"):
        load_run(None, overrides).check_optimizer({})


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "mics_shard_size"),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "bf16.bf16_master_weights"),
    ],
)
def test_options_under_which_masters_are_elsewhere_are_refused_for_muon_alone(raw, named):
    load_run(None).check_optimizer(raw)
    with pytest.raises(ConfigError, match=f"optimizer.name 'muon' needs fp32 masters .*{named}.*: remove it"):
        load_run(None, ["optimizer.name=muon"]).check_optimizer(raw)


def test_options_that_say_no_are_none_for_muon():
    raw = {"zero_optimization": {"offload_optimizer": {"device": "none"}, "cpu_offload": False}}
    load_run(None, ["optimizer.name=muon"]).check_optimizer(raw)


def test_tiles_are_refused_where_each_would_have_scales_of_its_own():
    load_run(None, ["parallel.mlp_tile_tokens=64"])
    with pytest.raises(
        ConfigError, match=r"mlp_tile_tokens 64 would scale each tile by itself .*: set it to 0"
    ):
        load_run(None, ["parallel.mlp_tile_tokens=64", "fp8.recipe=rowwise"])
