"""Layers on stages: as megatron-core itself shares them out, told the arguments that we write."""

from types import SimpleNamespace

import pytest

from megalite.checkpoint.format import CheckpointError
from megalite.checkpoint.megatron_args import layout_args
from megalite.checkpoint.megatron_layout import check_divides, stage_sizes, stages_of
from megalite.config.model import ModelConfig

transformer_block = pytest.importorskip("megatron.core.transformer.transformer_block")
transformer_layer = pytest.importorskip("megatron.core.transformer.transformer_layer")


def stages_of_megatron(num_layers: int, pp_size: int, first: int | None, last: int | None) -> list[range]:
    config = SimpleNamespace(
        num_layers=num_layers,
        pipeline_model_parallel_size=pp_size,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
        pipeline_model_parallel_layout=None,
        virtual_pipeline_model_parallel_size=None,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
    )
    found = []
    for rank in range(pp_size):
        begin = transformer_layer.get_transformer_layer_offset(config, None, rank)
        size = transformer_block.get_num_layers_to_build(config, None, rank)
        found.append(range(begin, begin + size))
    return found


@pytest.mark.parametrize("pp_size", range(1, 13))
def test_megatron_shares_layers_out_alike(pp_size):
    """For every number of layers, and every number at the ends that is taken."""
    num_taken = 0
    for num_layers in range(pp_size, 31):
        ends: list[int | None] = [None, *range(1, num_layers)] if pp_size < 5 else [None, 1, 2]
        for first in ends:
            for last in ends:
                try:
                    sizes = stage_sizes(num_layers, pp_size, first, last)
                except CheckpointError:
                    assert (first, last) != (None, None)
                    continue
                args = layout_args(1, sizes, 1)
                told = [args[f"decoder_{end}_pipeline_num_layers"] for end in ("first", "last")]
                theirs = stages_of_megatron(num_layers, pp_size, *told)
                assert [stage.layers for stage in stages_of(sizes)] == theirs
                assert min(sizes) > 0 and first in (None, sizes[0]) and last in (None, sizes[-1])
                num_taken += 1
    assert num_taken >= 31 - pp_size


def test_the_largest_stage_is_as_small_as_it_can_be():
    """No stage has more than the layers over the stages, but where those between would be left too few."""
    assert stage_sizes(10, 4) == [2, 3, 3, 2]
    assert stage_sizes(5, 2) == [3, 2]
    assert stage_sizes(14, 4) == [3, 4, 4, 3]
    assert stage_sizes(9, 8) == [2, 1, 1, 1, 1, 1, 1, 1]
    assert stage_sizes(12, 4) == [3, 3, 3, 3]
    for num_layers in range(1, 60):
        for pp_size in range(1, num_layers + 1):
            assert max(stage_sizes(num_layers, pp_size)) == least_largest(num_layers, pp_size)


def least_largest(num_layers: int, pp_size: int) -> int:
    """By trying: stages between the ends are equal."""
    if pp_size == 1:
        return num_layers
    tried = [
        max(first, between * (pp_size > 2), num_layers - first - (pp_size - 2) * between)
        for between in range(1, num_layers + 1)
        for first in range(1, num_layers)
        if num_layers - first - (pp_size - 2) * between > 0
    ]
    return min(tried)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 3), "pipeline parallel size 3 is more than num_hidden_layers 2"),
        ((8, 3, 1), "8 layers less 1 at the ends leave 7 for 2 stages"),
        ((8, 3, 3, 5), "8 layers less 3 and 5 at the ends leave 0 for 1 stages"),
        ((8, 2, 3, 4), "8 layers less 3 and 4 at the ends leave 1 for 0 stages"),
        ((8, 1, 4, 4), "a single stage has all 8 layers"),
        ((8, 1, 4), "8 layers less 4 at the ends leave 4 for 0 stages"),
    ],
)
def test_stages_that_megatron_does_not_have_are_refused(sizes, message):
    with pytest.raises(CheckpointError, match=message):
        stage_sizes(*sizes)


EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}


@pytest.mark.parametrize(
    ("fields", "tp_size", "message"),
    [
        ({"intermediate_size": 49}, 2, "2 does not divide intermediate_size 49"),
        (EXPERTS | {"intermediate_size": 49, "first_k_dense_replace": 1}, 2, "intermediate_size 49"),
        (EXPERTS | {"intermediate_size": 49}, 2, None),  # no layer is of that width
        (EXPERTS | {"moe_intermediate_size": 21}, 2, "2 does not divide moe_intermediate_size 21"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 48},
            6,
            "6 neither divides num_key_value_heads 4",
        ),
        ({"num_attention_heads": 8, "num_key_value_heads": 2}, 8, None),  # with copies of key heads
    ],
)
def test_widths_that_some_layer_has_must_divide(fields, tp_size, message):
    model = ModelConfig(**{"head_dim": 8} | fields)
    if message is None:
        check_divides(model, tp_size)
        return
    with pytest.raises(CheckpointError, match=message):
        check_divides(model, tp_size)
