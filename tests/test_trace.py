"""The trace is silent on layouts that are right, and names the module of a planted error."""

from dataclasses import replace
from functools import cache

import pytest

from megalite.model.rope import RotaryEmbedding
from megalite.parallel.context import ParallelContext
from tests.trace import BACKWARD, FORWARD, first_departure, reference_trace, traces_of_world
from tests.trainers import MODEL, SEED, Case

LAYOUTS = [
    Case(tp=2, pp=2),
    Case(tp=4),  # two copies of each key/value head
    Case(tp=4, sp=False, zero=1, tied=True),
    Case(dp=2),
    Case(tp=2, pp=2, zero=2, sp=False, recompute="full", documents=True, uneven=True),
    Case(pp=2, dp=2, schedule="afab", recompute="selective", tied=True),
    Case(tp=2, dp=2, ep=2, model_kind="experts"),
    Case(cp=2, tp=2, documents=True, way="ring"),
    Case(cp=2, dp=2, zero=1, uneven=True, way="heads"),
]


def turn_by_other_angles(stage, context):
    if context["tp"].rank == 1 and 1 in stage.share.layers:
        config = MODEL.model_copy(update={"rope_theta": 100.0})
        stage.layers["1"].self_attn.rotary = RotaryEmbedding(config)


def forget_to_sum_the_input_gradient(stage, context):
    if 1 in stage.share.layers:
        layer = stage.layers["1"].self_attn.qkv
        layer.plan = replace(layer.plan, context=ParallelContext())


def scale_the_residual(stage, context):
    if 2 in stage.share.layers:
        stage.layers["2"].register_forward_hook(lambda block, args, output: output + 0.01 * args[0])


def forget_to_sum_the_attention(stage, context):
    if 3 in stage.share.layers:
        stage.layers["3"].self_attn.o_proj.leave = lambda x, group: x


def copies_differ(stage, context):
    if context["tp"].rank == 3:
        norm = stage.layers["0"].post_attention_layernorm
        norm.register_forward_hook(lambda module, args, output: output * 1.001)


def see_other_samples(stage, context):
    if context["dp"].rank == 1 and stage.share.has_embedding:
        stage.embed_tokens.register_forward_hook(lambda module, args, output: output.flip(1))


def forget_to_sum_the_norm(stage, context):
    norm = stage.layers["1"].input_layernorm  # its gradients are parts of a sum under sequence parallelism
    norm.plan = replace(norm.plan, context=ParallelContext())


FAULTS = [
    (turn_by_other_angles, Case(tp=2, pp=2), "model.layers.1.self_attn into o_proj", FORWARD),
    (turn_by_other_angles, Case(tp=4, sp=False), "model.layers.1.self_attn into o_proj", FORWARD),
    (forget_to_sum_the_input_gradient, Case(tp=2, sp=False), "model.layers.1.input_layernorm", BACKWARD),
    (scale_the_residual, Case(tp=2, pp=2), "model.layers.2", FORWARD),
    (forget_to_sum_the_attention, Case(tp=2, sp=False), "model.layers.3.self_attn.o_proj", FORWARD),
    (copies_differ, Case(tp=4, sp=False), "model.layers.0.post_attention_layernorm", FORWARD),
    (see_other_samples, Case(dp=2, zero=1), "model.embed_tokens", FORWARD),
]


@cache
def departures_of_world(world_size):
    """Of every run that needs so many ranks, which are started once."""
    runs = [(case, None) for case in LAYOUTS] + [(case, fault) for fault, case, *_ in FAULTS]
    runs.append((Case(tp=2), forget_to_sum_the_norm))
    runs = [run for run in runs if run[0].world_size == world_size]
    traces = traces_of_world(world_size, runs)
    return {
        run: first_departure(trace, reference_trace(run[0])) for run, trace in zip(runs, traces, strict=True)
    }


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_a_layout_that_is_right_departs_nowhere(case):
    assert departures_of_world(case.world_size)[case, None] is None


@pytest.mark.parametrize(("fault", "case", "module", "direction"), FAULTS)
def test_a_planted_error_is_named_by_its_module_and_direction(fault, case, module, direction):
    departure = departures_of_world(case.world_size)[case, fault]
    assert (departure.module, departure.direction) == (module, direction)
    assert departure.difference > 1e-4


def test_an_error_in_a_weights_gradient_alone_is_not_seen():
    """The limit of the trace, which its message says."""
    case = Case(tp=2)
    assert departures_of_world(case.world_size)[case, forget_to_sum_the_norm] is None


def test_control_another_seed_departs_at_the_embedding():
    case = Case()
    departure = first_departure(reference_trace(case, SEED + 1), reference_trace(case))
    assert (departure.module, departure.direction) == ("model.embed_tokens", FORWARD)
