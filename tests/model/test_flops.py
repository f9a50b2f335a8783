import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megalite.batch import Batch
from megalite.config.model import ModelConfig
from megalite.config.tuning import LoraConfig
from megalite.model.flops import (
    adapters_of_fullest_stage,
    flops_per_token,
    model_state_bytes,
    model_state_bytes_per_rank,
    num_active_parameters,
    num_adapter_parameters,
    num_parameters,
    parameters_of_fullest_stage,
)
from megalite.model.llama import LlamaStage
from megalite.model.table import layer_table
from megalite.parallel.plan import LayerPlan, Lora

# name: V, h, L, A, K, i, tied, parameters as published
PUBLISHED = {
    "LiteLlama-460M": (50304, 1024, 24, 16, 2, 4096, False, 461_685_760),
    "LightLM FFN": (49152, 512, 32, 16, 4, 2048, True, 146_833_920),
    "LightLM Attn": (49152, 832, 34, 16, 4, 556, True, 146_975_296),
    "lilLM": (8192, 512, 12, 16, 8, 1408, True, 39_596_544),
    "lilLM-300M": (8192, 1024, 24, 16, 8, 2816, True, 291_554_304),
    "TinyLlama": (32000, 2048, 22, 32, 4, 5632, False, 1_100_048_384),
    "Llama-2-7B": (32000, 4096, 32, 32, 32, 11008, False, 6_738_415_616),
    "Llama-3-8B": (128256, 4096, 32, 32, 8, 14336, False, 8_030_261_248),
}


def llama(vocab, hidden, layers, heads, kv_heads, mlp, tied=False):
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=None,
        intermediate_size=mlp,
        tie_word_embeddings=tied,
    )


LITE_LLAMA = llama(*PUBLISHED["LiteLlama-460M"][:7])


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_model(name):
    *shape, parameters = PUBLISHED[name]
    assert num_parameters(llama(*shape)) == parameters


def test_one_more_layer_is_one_more_layer():
    deeper = LITE_LLAMA.model_copy(update={"num_hidden_layers": 25})
    assert num_parameters(deeper) - num_parameters(LITE_LLAMA) == 14_944_256


def test_flops_agree_with_megatron_without_recomputation():
    # arXiv 2104.04473, equation 3, is 96 B s l h^2 (1 + s/6h + V/16lh) with every forward done twice: 72 and
    # V/12lh without. Its MLP holds 8 h^2 numbers, like a gated one of width 8h/3; each head has a K and V.
    vocab, hidden, layers, seq_length = 1000, 192, 5, 64
    config = llama(vocab, hidden, layers, 8, 8, 8 * hidden // 3)
    megatron = 72 * layers * hidden**2 + 12 * layers * hidden * seq_length + 6 * vocab * hidden
    assert flops_per_token(config, seq_length) == megatron
    assert flops_per_token(config, seq_length + 1) != megatron


def test_flops_count_the_experts_that_a_token_uses_and_parameters_all():
    """A dense MLP as wide as the chosen and shared experts together does the same work, without a router."""
    dense = llama(1000, 192, 5, 8, 8, 3 * 64)
    experts = {"n_routed_experts": 16, "num_experts_per_tok": 2, "n_shared_experts": 1}
    sparse = ModelConfig(**dense.model_dump() | experts | {"moe_intermediate_size": 64})
    routers = 5 * 16 * 192
    assert flops_per_token(sparse, 64) - flops_per_token(dense, 64) == 6 * routers
    assert num_active_parameters(sparse) - num_parameters(dense) == routers
    assert num_parameters(sparse) - num_parameters(dense) == routers + 5 * 14 * 3 * 192 * 64


def test_the_fullest_stage_has_the_layers_with_experts():
    model = ModelConfig(n_routed_experts=8, moe_intermediate_size=640, first_k_dense_replace=2)
    last_two = [row.num_elements for layer in (2, 3) for row in layer_table(model, layer)]
    head = model.vocab_size * model.hidden_size + model.hidden_size
    assert parameters_of_fullest_stage(model, pp_size=2) == sum(last_two) + head


def test_flops_count_the_output_layer_whether_tied_or_not():
    tied = LITE_LLAMA.model_copy(update={"tie_word_embeddings": True})
    assert flops_per_token(tied, 1024) == flops_per_token(LITE_LLAMA, 1024)
    assert flops_per_token(LITE_LLAMA, 1024) == pytest.approx(2.76e9, rel=2e-3)


@pytest.mark.parametrize("targets", [LoraConfig().targets, ["q_proj", "down_proj"]])
@pytest.mark.parametrize("rank", [0, 3])
def test_flops_of_matrices_are_those_that_torch_counts(rank, targets):
    """Attention is counted apart, by torch under another name, here by the length: 0 stands for none of it.

    Beside adapters, torch computes no gradient of the first layer's inputs where the weights have no adapter:
    nothing below them learns. Those with one are computed by the adapter's first factor, 2 r in for each.
    """
    config, lora = llama(128, 32, 2, 4, 2, 48), LoraConfig(rank=rank, targets=targets)
    plan = LayerPlan(lora=Lora(rank, lora.scale, tuple(targets)) if rank else None)
    stage, (b, s) = LlamaStage(config, plan), (2, 8)
    ids = torch.arange(b * s).view(b, s)
    with FlopCounterMode(display=False) as counter:
        stage(None, Batch(ids, ids)).backward()
    counts = counter.get_flop_counts()["Global"]
    counted = sum(count for operation, count in counts.items() if "mm" in str(operation))
    skipped = 2 * 32 * (32 + 16 + 16) + 2 * rank * 32 * sum(f"{x}_proj" in targets for x in "qkv")
    assert counted == b * s * (flops_per_token(config, 0, lora) - (skipped if rank else 0))


def test_adapters_are_counted_beside_a_frozen_model():
    """LiteLlama with rank 8 on the query and down projections, as stated there: out + in numbers per rank."""
    lora = LoraConfig(rank=8, targets=["q_proj", "down_proj"])
    of_layer = 8 * (1024 + 1024) + 8 * (4096 + 1024)
    assert num_adapter_parameters(LITE_LLAMA, lora) == 24 * of_layer
    assert num_adapter_parameters(LITE_LLAMA, LoraConfig()) == 0
    cut = 8 * (1024 + 1024 // 4) + 8 * (4096 // 4 + 1024)  # A of a column layer is whole, B of a row layer
    assert adapters_of_fullest_stage(LITE_LLAMA, lora, tp_size=4, pp_size=5) == 5 * cut
    memory = model_state_bytes(10, num_frozen_parameters=1000, dp_size=2, zero_stage=2, precision="bf16")
    assert (memory.parameters, memory.gradients, memory.optimizer) == (2020, 10, 60)
    memory = model_state_bytes(10, num_frozen_parameters=1000, dp_size=2, zero_stage=3, precision="fp32")
    assert (memory.parameters, memory.gradients, memory.optimizer) == (2020, 20, 40)


@pytest.mark.parametrize(
    ("stage", "gigabytes"),
    [(0, 120), (1, 31.4), (2, 16.6), (3, 1.88)],
)
def test_memory_is_that_of_the_zero_paper(stage, gigabytes):
    """arXiv 1910.02054, figure 1: 7.5B parameters, 64 ranks, mixed precision."""
    memory = model_state_bytes(7_500_000_000, dp_size=64, zero_stage=stage, precision="fp16")
    assert memory.total / 1e9 == pytest.approx(gigabytes, rel=5e-3)


def test_gradients_summed_in_fp32_take_four_bytes():
    memory = model_state_bytes(10, dp_size=1, zero_stage=1, precision="bf16", grad_accum_dtype="fp32")
    assert (memory.parameters, memory.gradients, memory.optimizer) == (20, 40, 120)


@pytest.mark.parametrize(("precision", "optimizer"), [("fp32", 80), ("bf16", 120)])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weights_in_half_precision_alone_have_a_master_copy(stage, precision, optimizer):
    assert model_state_bytes(10, dp_size=1, zero_stage=stage, precision=precision).optimizer == optimizer


@pytest.mark.parametrize("tied", [False, True])
def test_one_rank_holds_the_whole_model(tied):
    config = LITE_LLAMA.model_copy(update={"tie_word_embeddings": tied})
    assert parameters_of_fullest_stage(config) == num_parameters(config)
    assert model_state_bytes_per_rank(config).total == 16 * num_parameters(config)


def test_key_value_heads_are_held_by_every_rank_beyond_their_number():
    per_layer = [
        parameters_of_fullest_stage(LITE_LLAMA.model_copy(update={"num_hidden_layers": layers}), tp_size=4)
        for layers in (1, 2)
    ]
    norms, query_output, mlp, key_value = 2 * 1024, 2 * 1024 * 1024, 3 * 1024 * 4096, 2 * 1024 * 128
    assert per_layer[1] - per_layer[0] == norms + query_output // 4 + mlp // 4 + key_value // 2


def test_a_pipeline_stage_holds_its_layers_and_one_table():
    layers, table, norm = 6 * 14_944_256, 50304 * 1024, 1024
    assert parameters_of_fullest_stage(LITE_LLAMA, pp_size=4) == layers + table + norm
