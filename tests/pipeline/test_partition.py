"""Layers to stages: every small case."""

import pytest

from megalite.pipeline.partition import layers_of_stage

CASES = [(layers, stages) for stages in range(1, 13) for layers in range(stages, 41)]


@pytest.mark.parametrize("num_stages", range(1, 13))
def test_every_layer_lives_on_exactly_one_stage_in_order(num_stages):
    for num_layers in range(num_stages, 41):
        stages = [layers_of_stage(num_layers, num_stages, stage) for stage in range(num_stages)]
        assert [layer for layers in stages for layer in layers] == list(range(num_layers))


def test_stages_differ_by_at_most_one_layer_and_none_is_empty():
    for num_layers, num_stages in CASES:
        sizes = [len(layers_of_stage(num_layers, num_stages, stage)) for stage in range(num_stages)]
        assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1, (num_layers, num_stages, sizes)


def test_the_remainder_goes_first_to_stages_without_embedding_and_head():
    for num_layers, num_stages in CASES:
        sizes = [len(layers_of_stage(num_layers, num_stages, stage)) for stage in range(num_stages)]
        inner = sizes[1:-1]
        if inner and max(sizes[0], sizes[-1]) > min(sizes):
            assert min(inner) == max(sizes), (num_layers, num_stages, sizes)
        assert sizes[-1] <= min(sizes), (num_layers, num_stages, sizes)


@pytest.mark.parametrize(
    ("num_layers", "sizes"), [(8, [2, 2, 2, 2]), (9, [2, 3, 2, 2]), (10, [2, 3, 3, 2]), (11, [3, 3, 3, 2])]
)
def test_four_stages_written_out_by_hand(num_layers, sizes):
    assert [len(layers_of_stage(num_layers, 4, stage)) for stage in range(4)] == sizes


def test_sizes_that_are_given_are_taken_in_their_order():
    stages = [layers_of_stage(12, 4, stage, sizes=[1, 6, 2, 3]) for stage in range(4)]
    assert stages == [range(1), range(1, 7), range(7, 9), range(9, 12)]


def test_fewer_layers_than_stages_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"3 layers .* 4 pipeline stages.*parallel\.pp_size"):
        layers_of_stage(3, 4, 0)


@pytest.mark.parametrize("stage", [-1, 4])
def test_a_stage_that_does_not_exist_is_refused(stage):
    with pytest.raises(ValueError, match=f"stage {stage} does not exist in a pipeline of 4"):
        layers_of_stage(8, 4, stage)


@pytest.mark.parametrize("sizes", [[3, 3], [3, 3, 3]])
def test_sizes_of_other_stages_or_layers_are_refused(sizes):
    with pytest.raises(ValueError, match=r"layers per stage .* stages and .* layers: expected 2 and 9"):
        layers_of_stage(9, 2, 0, sizes=sizes)
