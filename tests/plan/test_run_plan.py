"""A plan on paper: its arithmetic against the model's own, its lines for people, and what it refuses."""

import json
from math import exp
from pathlib import Path

import pytest

from megalite.config.deepspeed import deepspeed_config_from
from megalite.config.device import DeviceConfig, dump_device, load_device
from megalite.config.load import load_run
from megalite.config.section import ConfigError
from megalite.measure.hardware import PEAK_TFLOPS
from megalite.model.flops import flops_per_token, num_parameters
from megalite.plan.communication import Flow, data_flows, stage_flows
from megalite.plan.cut import balanced_cut, with_layers
from megalite.plan.interval import checkpoint_plan, daly_interval, young_interval
from megalite.plan.job import Job, check_job
from megalite.plan.page import page_of
from megalite.plan.plan import make_plan
from megalite.plan.stage import rank_size, stage_size
from megalite.plan.step_time import step_time
from megalite.plan.work import stage_seconds

DEVICES = Path(__file__).parents[2] / "configs" / "devices"

PLAIN = DeviceConfig(  # a TFLOP/s, nothing but products, and links of a GB/s without latency
    name="plain", peak_tflops=1.0, peak_tflops_fp32=1.0, memory_gib=1.0, memory_gb_per_second=1e9,
    link_gb_per_second=1.0, network_gb_per_second=0.5, matmul_efficiency=1.0, expert_efficiency=1.0,
    elementwise_bytes=0.0,
    communication_efficiency=1.0, link_latency_seconds=0.0, network_latency_seconds=0.0, overlap=0.0,
)  # fmt: skip
SMALL = [
    "model.vocab_size=1024", "model.hidden_size=64", "model.intermediate_size=128",
    "model.num_hidden_layers=8", "model.num_attention_heads=8", "model.num_key_value_heads=8",
    "data.seq_length=64",
]  # fmt: skip
LAYER = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
TABLES = 2 * 1024 * 64 / (8 * LAYER + 2 * 1024 * 64 + 64)  # of all numbers: backward does not read them
EXPERTS = [
    "model.n_routed_experts=8", "model.moe_intermediate_size=32", "model.n_shared_experts=1",
    "model.first_k_dense_replace=1",
]  # fmt: skip


def job_of(*overrides, nodes=1, per_node=8, zero=1, batch=32, micro=2, device=PLAIN, **sizes):
    """A small run, `overrides` of its parallel section or with a dot of any."""
    words = [word if "." in word else f"parallel.{word}" for word in overrides]
    raw = {"train_batch_size": batch, "train_micro_batch_size_per_gpu": micro}
    raw["zero_optimization"] = {"stage": zero} | sizes
    run = load_run(None, [*SMALL, *words])
    return Job(run, deepspeed_config_from(raw, "a test"), device, nodes, per_node)


@pytest.mark.parametrize("experts", [[], EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize(
    "layout",
    [[], ["tp_size=4"], ["pp_size=4"], ["tp_size=2", "cp_size=2"], ["pp_size=2", "pipeline_schedule=zbv"]],
)
def test_the_stages_compute_what_the_model_is_counted_to_need(layout, experts):
    job = job_of(*layout, *experts)
    parallel = job.run.parallel
    shares = [share for rank in range(parallel.pp_size) for share in job.shares(rank)]
    seconds = sum(stage_seconds(job, share).total for share in shares)  # of one micro batch
    tokens = job.deepspeed.train_micro_batch_size_per_gpu * job.run.data.seq_length
    expected = tokens * flops_per_token(job.run.model, job.run.data.seq_length) / 1e12
    # Routers are not cut over tp, and all ranks compute them: below 3 % of this model's products.
    assert seconds * parallel.tp_size * parallel.cp_size == pytest.approx(
        expected, rel=0.03 if experts else 1e-6
    )


@pytest.mark.parametrize("tied", ["false", "true"])
@pytest.mark.parametrize("pp_size", [1, 2, 4])
def test_the_stages_hold_the_model(pp_size, tied):
    job = job_of(f"pp_size={pp_size}", f"model.tie_word_embeddings={tied}", *EXPERTS)
    held = sum(rank_size(job.run, job.shares(rank)).parameters for rank in range(pp_size))
    table = job.run.model.vocab_size * job.run.model.hidden_size
    copies = table if tied == "true" and pp_size > 1 else 0  # the last stage has its own
    assert held == num_parameters(job.run.model) + copies


def test_recomputation_is_a_forward_of_the_layers_or_of_attention():
    kinds = {kind: job_of(f"recompute={kind}") for kind in ("none", "selective", "full")}
    seconds = {kind: stage_seconds(job, job.shares(0)[0]) for kind, job in kinds.items()}
    h, layers, tokens = 64, 8, 2 * 64
    assert seconds["none"].recomputed == 0
    assert seconds["selective"].recomputed == pytest.approx(4 * 64 * h * tokens * layers / 1e12)
    products = layers * (4 * h * h + 3 * h * 128)
    assert seconds["full"].recomputed == pytest.approx((2 * products + 4 * 64 * h * layers) * tokens / 1e12)
    assert seconds["full"].total - seconds["none"].total == pytest.approx(seconds["full"].recomputed)


def sent(flows):
    """Bytes that a rank sends, by axis, kind and phase."""
    found = {}
    for flow in flows:
        key = (flow.axis, flow.kind, flow.phase)
        found[key] = found.get(key, 0) + flow.sent_bytes
    return found


def test_tensor_parallel_traffic_is_written_out_for_one_layer():
    """[s, b, h] in fp32; of 4 ranks each sends 3 / 4: twice per layer and way, and gathers inputs again."""
    job = job_of("tp_size=4", "model.num_hidden_layers=1")
    whole = 64 * 2 * 64 * 4
    assert sent(stage_flows(job, job.shares(0)[0])) == {
        ("tp", "all-gather", "forward"): 3 / 4 * whole * (2 + 1),  # and into the head
        ("tp", "reduce-scatter", "forward"): 3 / 4 * whole * (2 + 2),  # and out of embedding and head
        ("tp", "all-gather", "backward_input"): 3 / 4 * whole * (2 + 1),  # and of the embedding's gradient
        ("tp", "reduce-scatter", "backward_input"): 3 / 4 * whole * 2,
        ("tp", "all-gather", "backward_weight"): 3 / 4 * whole * 2,
    }


@pytest.mark.parametrize(
    ("zero", "gathering", "expected"),
    [
        (0, "step", {("dp", "all-reduce", "step"): 2}),
        (1, "step", {("dp", "reduce-scatter", "step"): 1, ("dp", "all-gather", "step"): 1}),
        (2, "step", {("dp", "reduce-scatter", "backward_weight"): 1, ("dp", "all-gather", "step"): 1}),
        (3, "step", {("dp", "reduce-scatter", "backward_weight"): 1, ("dp", "all-gather", "step"): 1}),
        (
            3,
            "micro_batch",
            {
                ("dp", "reduce-scatter", "backward_weight"): 1,
                ("dp", "all-gather", "forward"): 1,
                ("dp", "all-gather", "backward_input"): 1 - TABLES,
            },
        ),
    ],
)
def test_zero_sends_as_often_as_its_stage_says(zero, gathering, expected):
    job = job_of(f"parameter_gathering={gathering}", zero=zero)
    size = rank_size(job.run, job.shares(0))
    once = 7 / 8 * num_parameters(job.run.model) * 4
    assert sent(data_flows(job, size)) == pytest.approx(
        {key: times * once for key, times in expected.items()}
    )


@pytest.mark.parametrize(
    ("sizes", "reductions", "gathers"),
    [
        ({}, 8 + 2, 12),  # a layer; a table each; 8 layers, and tables of 1.6 layers each
        ({"reduce_bucket_size": LAYER / 2}, 2 * 8 + 2, 12),
        ({"stage3_prefetch_bucket_size": LAYER / 2}, 8 + 2, 23),
        ({"stage3_prefetch_bucket_size": 0}, 8 + 2, 8),
    ],
)  # fmt: skip
def test_as_much_goes_into_one_collective_as_the_run_sets(sizes, reductions, gathers):
    job = job_of(zero=3, **sizes)
    calls = {flow.what: flow.num_calls for flow in data_flows(job, rank_size(job.run, job.shares(0)))}
    assert calls == {"gradients": reductions, "weights": gathers}


def test_adapters_alone_are_reduced_beside_experts():
    job = job_of("lora.rank=4", *EXPERTS, zero=1)
    size = rank_size(job.run, job.shares(0))
    reduced = [flow for flow in data_flows(job, size) if flow.what == "gradients"]
    assert sum(flow.size_bytes * flow.num_calls for flow in reduced) == pytest.approx(4 * size.trained)


def test_a_ring_that_leaves_the_node_goes_at_the_speed_of_its_ranks_networks():
    within = Flow("all-gather", "dp", "", "step", 8e9, 1, 8, 8)
    two_nodes = Flow("all-gather", "dp", "", "step", 16e9, 1, 16, 8)
    one_each = Flow("all-gather", "dp", "", "step", 2e9, 1, 2, 1)
    slow = PLAIN.model_copy(update={"network_gb_per_second": 0.1})
    assert within.seconds(PLAIN) == pytest.approx(7)  # 7 GB at 1 GB/s
    assert two_nodes.seconds(PLAIN) == pytest.approx(15)  # 8 x 0.5 GB/s, more than the links give
    assert two_nodes.seconds(slow) == pytest.approx(15 / 0.8)
    assert one_each.seconds(PLAIN) == pytest.approx(1 / 0.5)


def test_the_parts_of_a_step_are_the_step():
    job = job_of("tp_size=2", "pp_size=2", "recompute=full", zero=3, batch=16)
    plan = make_plan(job)
    assert sum(plan.step.parts.values()) == pytest.approx(plan.step.total)
    assert {
        "computation",
        "recomputation",
        "tp communication",
        "dp communication",
        "waiting for stages",
    } <= set(plan.step.parts)
    assert plan.tokens_per_second * plan.step.total == pytest.approx(16 * 64)


def test_ranks_that_share_processors_take_turns():
    alone = make_plan(job_of("tp_size=2", per_node=4)).step
    shared = PLAIN.model_copy(update={"processors_per_node": 2})
    together = make_plan(job_of("tp_size=2", per_node=4, device=shared)).step
    assert together.total == pytest.approx(2 * alone.total, rel=1e-6)
    assert together.parts["waiting for processors"] == pytest.approx(alone.total, rel=1e-6)


def lost(interval, d, mean):
    """Daly's exact expected time per second of work, restarts at no cost: M (e^((t + d) / M) - 1) / t."""
    return mean * (exp((interval + d) / mean) - 1) / interval


def test_the_interval_is_where_least_is_lost():
    """Daly 2006, equation 13 written out, minimised by trying; 37 is its estimate, Young's a coarser one."""
    for d, mean in ((10.0, 1e5), (300.0, 1e4), (60.0, 3600.0)):
        least = min(lost(t * d / 50, d, mean) for t in range(1, 20_000))
        assert lost(daly_interval(d, mean), d, mean) == pytest.approx(least, rel=1e-4)
        assert least <= lost(young_interval(d, mean), d, mean)
    assert daly_interval(100.0, 40.0) == 40.0  # more than half of the time would be writing


def test_a_checkpoint_has_masters_and_moments_once():
    job = job_of()
    assert checkpoint_plan(job).size_bytes == 12 * num_parameters(job.run.model)
    muon = job_of("optimizer.name=muon")
    tables = 2 * 1024 * 64 + 64 * (2 * 8 + 1)  # embedding, head and norms keep AdamW's two
    assert checkpoint_plan(muon).size_bytes == 8 * num_parameters(job.run.model) + 4 * tables


@pytest.mark.parametrize(
    ("overrides", "options", "line"),
    [
        (["tp_size=3"], {}, "8 processes cannot be divided into tp_size 3"),
        (["tp_size=8"], {"nodes": 2, "per_node": 4}, "parallel.tp_size 8 exceeds the 4 devices of a node"),
        (
            ["pp_size=4", "pipeline_schedule=interleaved", "num_chunks=4"],
            {},
            "pp_size 4 x 4 chunks of pipeline_schedule interleaved exceeds model.num_hidden_layers 8",
        ),
        ([], {"batch": 24}, "train_batch_size 24 is not divisible by"),
        (["ep_size=2", *EXPERTS], {}, "parallel.ep_size 2 needs ZeRO stage 3"),
    ],
)  # fmt: skip
def test_what_does_not_exist_is_refused_in_one_line(overrides, options, line):
    with pytest.raises(ConfigError) as error:
        check_job(job_of(*overrides, **options))
    assert line in str(error.value) and "\n" not in str(error.value)


def test_what_does_not_fit_and_what_is_slow_is_told_with_its_remedy():
    tiny = PLAIN.model_copy(update={"memory_gib": 0.001})
    plan = make_plan(job_of("pp_size=4", zero=1, batch=16, micro=4, device=tiny))
    told = "\n".join(plan.warnings)
    assert not plan.fits and plan.warnings[0].startswith("does not fit: pipeline rank")
    assert "stages wait" in told and "with 2 micro batches for 4 stages" in told
    assert all(": " in line and "\n" not in line for line in plan.warnings)


def test_stages_that_are_not_equal_get_layers_so_that_they_are():
    """A table of 6.4 layers makes the last stage the slowest: 7 layers and 1 with it are 7 and 7.4."""
    job = job_of("pp_size=2", "model.vocab_size=4096", batch=1024)
    layers = balanced_cut(job)
    assert layers == [7, 1]
    faster = step_time(with_layers(job, layers)).total / step_time(job).total
    told = [line for line in make_plan(job).warnings if "layers_per_stage" in line]
    assert len(told) == 1 and told[0].endswith("parallel.layers_per_stage=[7,1]")
    assert f"a step is {1 / faster - 1:.0%} faster" in told[0] and faster < 0.97
    equal = make_plan(with_layers(job, layers))
    assert not [line for line in equal.warnings if "layers_per_stage" in line]


def test_a_cut_whose_slowest_ranks_are_equally_slow_gets_better():
    assert balanced_cut(job_of("pp_size=4", "layers_per_stage=[3,3,1,1]")) != [3, 3, 1, 1]


@pytest.mark.parametrize("experts", [[], EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "interleaved"])
def test_a_balanced_cut_is_a_cut_of_the_same_model(schedule, experts):
    job = job_of("pp_size=2", f"pipeline_schedule={schedule}", *experts, batch=64)
    layers = balanced_cut(job)
    check_job(with_layers(job, layers))
    assert sum(layers) == 8 and min(layers) > 0
    assert balanced_cut(with_layers(job, layers)) == layers


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_a_row_layer_in_pieces_sends_as_much_and_hides_all_but_one(pieces):
    job = job_of("tp_size=2", f"row_overlap_chunks={pieces}", per_node=2)
    share = job.shares(0)[0]
    flows = stage_flows(job, share)
    whole = stage_flows(job_of("tp_size=2", per_node=2), share)
    assert sent(flows) == pytest.approx(sent(whole))
    scattered = [f for f in flows if (f.kind, f.phase) == ("reduce-scatter", "forward")]
    gathered = [f for f in flows if (f.kind, f.phase) == ("all-gather", "backward_input")]
    for calls, ends in ((scattered, 2), (gathered, 1)):
        assert sum(f.num_calls for f in calls if f.is_hidden) == 2 * 8 * (pieces - 1)
        assert sum(f.num_calls for f in calls if not f.is_hidden) == 2 * 8 + ends


def test_row_layers_with_adapters_and_of_routed_experts_are_not_cut():
    adapted = job_of("tp_size=2", "row_overlap_chunks=2", "lora.rank=2", per_node=2)
    experts = job_of("tp_size=2", "row_overlap_chunks=2", *EXPERTS, per_node=2)
    for job, num_cut in ((adapted, 0), (experts, 8 + 1)):
        scattered = [f for f in stage_flows(job, job.shares(0)[0]) if f.kind == "reduce-scatter"]
        hidden = [f for f in scattered if f.is_hidden and f.phase == "forward"]
        assert sum(f.num_calls for f in hidden) == num_cut


def test_the_page_is_aligned_and_the_json_whole():
    plan = make_plan(job_of("tp_size=2", "pp_size=2"))
    page, values = page_of(plan), json.loads(json.dumps(plan.to_json()))
    for title in ("memory of a pipeline rank", "sent by a rank in a step", "a step of the busiest rank"):
        assert title in page
    rows = [line for line in page.splitlines() if line.startswith(("  weights", "  gradients  ", "  total"))]
    assert len({len(line) for line in rows[:3]}) == 1
    assert values["grid"] == {"pp": 2, "dp": 2, "cp": 1, "tp": 2, "ep": 1}
    assert values["step_seconds"] == plan.step.total and len(values["memory_bytes"]) == 2


@pytest.mark.parametrize("path", sorted(DEVICES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_device_has_the_peak_that_runs_are_measured_against(path, tmp_path):
    device = load_device(path)
    row = PEAK_TFLOPS[path.stem.partition("-")[0].upper()]
    assert (device.peak_tflops, device.peak_tflops_fp32) == (row["half"], row["fp32"])
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_device(device), encoding="utf-8")
    assert load_device(copy) == device


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("- 1", "expected lines 'key: value'"),
        ("name: x", "peak_tflops: expected a value, which is required"),
        ("name: x\nspeed: 3", "unknown key 'speed'"),
        (": :", "not valid YAML"),
    ],
)
def test_a_wrong_device_is_refused_in_one_line(tmp_path, text, line):
    path = tmp_path / "device.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=line):
        load_device(path)


def test_a_device_that_is_not_there_names_its_neighbours(tmp_path):
    (tmp_path / "ours.yaml").write_text("name: x", encoding="utf-8")
    with pytest.raises(ConfigError, match="known beside it are ours"):
        load_device(tmp_path / "theirs.yaml")


def test_sizes_of_a_share_do_not_depend_on_the_schedule():
    plain, chunked = job_of("pp_size=2"), job_of("pp_size=2", "pipeline_schedule=interleaved", "num_chunks=2")
    sizes = [rank_size(job.run, job.shares(0)) for job in (plain, chunked)]
    assert sizes[0] == sizes[1] and stage_size(plain.run, plain.shares(1)[0]).table > 0
