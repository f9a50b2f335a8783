import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.blend import (
    BlendedDataset,
    blend_by_weight,
    parse_blend,
    target_samples,
)
from megalite.data.error import DataError
from megalite.data.gpt_dataset import GPTDataset


def test_golden_order_by_weight():
    assert blend_by_weight([0.5, 0.3, 0.2], 10).tolist() == [0, 1, 2, 0, 1, 0, 2, 0, 1, 0]


def test_golden_order_by_size():
    assert blend_by_weight([3, 2, 1], 6).tolist() == [0, 1, 2, 0, 1, 0]


def plain_greedy(weights, size):
    used, chosen = [0] * len(weights), []
    for i in range(size):
        errors = [w * float(max(i, 1)) - u for w, u in zip(weights, used, strict=True)]
        k = errors.index(max(errors))
        chosen.append(k)
        used[k] += 1
    return chosen


@settings(max_examples=50, deadline=None)
@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=5), size=st.integers(0, 80))
def test_the_order_is_the_first_dataset_furthest_behind(weights, size):
    array = np.array(weights)
    assert blend_by_weight(weights, size).tolist() == plain_greedy((array / array.sum()).tolist(), size)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_the_order_by_size_uses_everything_once(sizes):
    assert np.bincount(blend_by_weight(sizes, sum(sizes)), minlength=len(sizes)).tolist() == sizes


def test_targets_round_up_and_leave_a_surplus():
    assert target_samples([0.5, 0.3, 0.2], 11) == ([6, 4, 3], [7, 5, 4])


@pytest.mark.parametrize(
    "items, expected",
    [
        (["a"], (["a"], None)),
        (["a", "b"], (["a", "b"], None)),
        ([".3", "a", "0.7", "b"], (["a", "b"], [0.3, 0.7])),
        (["30", "a", "70"], (["30", "a", "70"], None)),
        (["1", " a "], (["a"], [1.0])),
    ],
)
def test_lists_are_read_as_megatron_reads_them(items, expected):
    assert parse_blend(items) == expected


@pytest.mark.parametrize("items", [[], ["1", "a", "b", "c"], ["0", "a", "1", "b"], ["-1", "a"], ["nan", "a"]])
def test_lists_without_a_meaning_are_refused(items):
    with pytest.raises(DataError, match="data"):
        parse_blend(items)


def test_samples_come_from_each_dataset_in_its_own_order(write_dataset):
    parts = [GPTDataset(write_dataset([[k] * 41], str(k)), 4, None, seed=1) for k in (1, 2)]
    blended = BlendedDataset(parts, [3, 1], 8)
    assert [int(blended[i][0]) for i in range(len(blended))] == [1, 2, 1, 1, 1, 2, 1, 1]
    assert blended.sample_index.tolist() == [0, 0, 1, 2, 3, 1, 4, 5]
    with pytest.raises(IndexError):
        blended[8]


def test_asking_a_dataset_for_more_than_it_has_is_refused(write_dataset):
    part = GPTDataset(write_dataset([[1] * 9]), 4, None, seed=1)
    with pytest.raises(DataError, match=r"data: the blend asks for 3 samples, found 2"):
        BlendedDataset([part], [1.0], 3)
