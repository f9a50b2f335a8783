"""The plan of a rank's memory, by hand and by its own rules; without torch."""

import subprocess
import sys

import pytest

from megalite.config.deepspeed import deepspeed_config_from
from megalite.config.load import load_run
from megalite.config.run import RunConfig
from megalite.plan.buckets import bucket_sizes
from megalite.plan.flight import ChunkBytes, fullest_moment
from megalite.plan.layout import RankLayout
from megalite.plan.memory import plan_memory
from megalite.plan.stage import largest_layer, rank_size
from megalite.plan.tensors import tensors_of_rank

# Attention with a key for each query head, MLP, two norms; embedding or head; last norm.
LAYER, TABLE, LAST = 4 * 64 * 64 + 3 * 64 * 96 + 2 * 64, 256 * 64, 64
SMALL = [
    "model.vocab_size=256",
    "model.hidden_size=64",
    "model.intermediate_size=96",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=4",
]
ALL = 2 * LAYER + 2 * TABLE + LAST
EXPERTS = [
    "model.n_routed_experts=4",
    "model.moe_intermediate_size=32",
    "model.first_k_dense_replace=1",
    "model.num_experts_per_tok=2",
]


def layout_of(world_size: int, *overrides: str, rank: int = 0, samples: int = 8, **zero) -> RankLayout:
    run: RunConfig = load_run(None, [*SMALL, *overrides], None)
    raw = {"train_batch_size": samples, "train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    return RankLayout(run, deepspeed_config_from(raw, "a test"), world_size, rank)


def plan_of(layout: RankLayout) -> dict[str, int]:
    return plan_memory(layout.run, layout.deepspeed, layout.world_size, layout.rank)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "moments"),
    [(0, 4, 4, 8), (1, 4, 4, 4), (2, 4, 2, 4), (3, 2, 2, 4)],
)
def test_state_of_fp32_on_two_ranks_has_one_copy_of_the_weights(stage, weights, gradients, moments):
    plan = plan_of(layout_of(2, stage=stage))
    found = [plan[name] for name in ("weights", "master copy", "gradients", "moments")]
    assert found == [size * ALL for size in (weights, 0, gradients, moments)]


def test_muon_keeps_one_number_for_each_of_a_matrix():
    plan = plan_of(layout_of(1, "optimizer.name=muon", stage=0))
    matrices = 2 * (LAYER - 2 * 64)
    assert plan["moments"] == 4 * matrices + 8 * (ALL - matrices)


def test_a_bucket_holds_the_largest_layer_unless_the_json_says_otherwise():
    chosen = bucket_sizes(layout_of(2, stage=3))
    assert chosen["reduce_bucket_size"] == chosen["stage3_prefetch_bucket_size"] == LAYER
    assert chosen["stage3_param_persistence_threshold"] == 640
    assert bucket_sizes(layout_of(2, stage=3, reduce_bucket_size=5e4))["reduce_bucket_size"] == 50_000
    assert bucket_sizes(layout_of(2, "model.num_hidden_layers=4", stage=1)) == {"reduce_bucket_size": LAYER}
    assert bucket_sizes(layout_of(2, "parallel.tp_size=2", stage=1))["reduce_bucket_size"] < LAYER


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(
    "options",
    [
        ["parallel.pp_size=2"],
        ["parallel.tp_size=2", "parallel.pp_size=2", *EXPERTS],
        ["parallel.ep_size=2", *EXPERTS],
        ["parallel.pp_size=2", "lora.rank=4"],
    ],
)
def test_the_largest_layer_is_that_of_the_rank_s_tensors(options, rank):
    layout = layout_of(4, *options, rank=rank, stage=3)
    layers: dict[int, int] = {}
    for tensor in tensors_of_rank(layout):
        if tensor.row.layer is not None and tensor.is_trained:
            layers[tensor.row.layer] = layers.get(tensor.row.layer, 0) + tensor.numel
    assert largest_layer(layout.run, rank_size(layout.run, layout.shares)) == max(layers.values())


@pytest.mark.parametrize(
    ("schedule", "most"),
    [("afab", (8, 8)), ("1f1b", (2, 1)), ("zb-h1", (2, 2))],
)
def test_a_schedule_keeps_so_many_micro_batches(schedule, most):
    """Huang 2019 and Narayanan 2021: all, or at most as many as stages follow, itself among them.

    ZB-H1 leaves of a micro batch what its weights' gradients need: here as much as all.
    """
    chunk = ChunkBytes(kept=1000, left=1000, forward=1, backward=1)
    options = ("parallel.pp_size=2", f"parallel.pipeline_schedule={schedule}")
    layouts = [layout_of(2, *options, rank=rank) for rank in range(2)]
    kept = [fullest_moment(layout, "cpu", chunks=[chunk]).kept for layout in layouts]
    assert kept == [1000 * number for number in most]


@pytest.mark.parametrize(
    ("gradients", "expected"),
    [
        (500, (1000, 20, 0, 0)),  # at the end of forward, when there are none yet
        (5000, (0, 10, 5000, 0)),  # at the end of backward, when nothing else is left
    ],
)
def test_one_micro_batch_has_gradients_when_its_activations_are_gone(gradients, expected):
    chunk = ChunkBytes(kept=1000, left=0, forward=20, backward=10)
    layout = layout_of(1, stage=1, samples=1)
    assert fullest_moment(layout, "cpu", gradients, [chunk]) == expected
    several = layout_of(1, stage=1, samples=2)
    assert fullest_moment(several, "cpu", gradients, [chunk]) == (1000, 20, gradients, 0)


def test_recomputation_and_long_samples_keep_less():
    kept = {
        name: plan_of(layout_of(1, f"parallel.recompute={name}", stage=0))["activations"]
        for name in ("none", "selective", "full")
    }
    assert kept["none"] > kept["selective"] > kept["full"]
    probabilities = kept["none"] - kept["selective"]
    # rows of 64, each with the keys up to its end: 64 x 64 + 64 x 128 for each of 4 heads, in 2 layers
    assert probabilities == 4 * 2 * 4 * (64 * 64 + 64 * 128)


def test_gating_that_is_computed_again_keeps_a_tensor_less():
    torchs, ligers = (
        plan_of(layout_of(1, f"kernels.gating={name}", stage=0))["activations"] for name in ("torch", "liger")
    )
    assert torchs - ligers == 4 * 2 * 128 * 96  # fp32, of 2 layers, for 128 tokens


def test_a_stage_without_the_other_end_has_no_table_of_it():
    first, last = (plan_of(layout_of(2, "parallel.pp_size=2", rank=r, stage=0)) for r in range(2))
    assert first["weights"] == 4 * (LAYER + TABLE)
    assert last["weights"] == 4 * (LAYER + TABLE + LAST)


def test_a_plan_needs_no_torch():
    code = "import sys, megalite.plan.memory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
