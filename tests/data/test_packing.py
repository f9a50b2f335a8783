"""Packing: every conversation once per epoch, whole, in samples that hold it, whatever the numbers are."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalite.data.error import DataError
from megalite.data.packing import SampleOrder, draw, epoch, pack

SEQ_LENGTH = 16
LENGTHS = st.lists(st.integers(1, SEQ_LENGTH), min_size=1, max_size=40).map(np.array)
ORDERS = st.builds(SampleOrder, st.just(SEQ_LENGTH), st.integers(0, 2**32 - 1), st.booleans(), st.booleans())


def lists(bins):
    return [bins.bin(i).tolist() for i in range(bins.num_bins)]


@given(lengths=LENGTHS, order=ORDERS, number=st.integers(0, 3))
def test_an_epoch_has_each_item_once_and_no_sample_is_too_full(lengths, order, number):
    samples = epoch(lengths, order, number)
    assert sorted(item for sample in samples for item in sample) == list(range(len(lengths)))
    assert max(sum(lengths[sample]) for sample in samples) <= SEQ_LENGTH
    assert order.packing or all(len(sample) == 1 for sample in samples)
    assert samples == epoch(lengths, order, number)


@given(lengths=LENGTHS)
def test_bins_are_filled_as_best_fit_decreasing_fills_them(lengths):
    """Against the rule written out: the fullest bin that has room, of those the one that got there last."""
    bins, touched = [], []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [b for b in range(len(bins)) if sum(lengths[bins[b]]) + lengths[item] <= SEQ_LENGTH]
        if fitting:
            best = max(fitting, key=lambda b: (sum(lengths[bins[b]]), touched[b]))
        else:
            best = len(bins)
            bins.append([])
            touched.append(0)
        bins[best].append(item)
        touched[best] = max(touched) + 1
    assert pack(lengths, SEQ_LENGTH) == bins


def test_short_items_fill_the_room_that_long_ones_leave():
    lengths = np.array([4, 10, 6, 12])
    assert [sum(lengths[one]) for one in pack(lengths, SEQ_LENGTH)] == [16, 16]


@given(lengths=LENGTHS, order=ORDERS, count=st.integers(1, 100), more=st.integers(0, 60))
def test_longer_draws_begin_with_shorter_ones(lengths, order, count, more):
    drawn = lists(draw([lengths], None, order, count))
    assert len(drawn) == count
    assert drawn == lists(draw([lengths], None, order, count + more))[:count]


def test_an_order_is_the_seed_s_and_the_epoch_s_own():
    lengths = np.full(50, 3)
    orders = [epoch(lengths, SampleOrder(SEQ_LENGTH, seed, True, True), number) for seed, number in
              ((1, 0), (1, 1), (2, 0))]  # fmt: skip
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[0] == epoch(lengths, SampleOrder(SEQ_LENGTH, 1, True, True), 0)


def test_without_shuffling_each_epoch_has_the_order_of_the_sources():
    lengths = np.array([3, 16, 16, 5])
    order = SampleOrder(SEQ_LENGTH, 7, True, False)
    assert epoch(lengths, order, 0) == epoch(lengths, order, 1) == [[0, 3], [1], [2]]
    assert lists(draw([lengths[:2], lengths[2:]], None, order, None)) == [[0, 3], [1], [2]]


@given(lengths=st.lists(LENGTHS, min_size=2, max_size=3), order=ORDERS, count=st.integers(1, 60))
def test_weighted_sources_have_their_shares_and_are_passed_through_one_by_one(lengths, order, count):
    weights = [3.0, 1.0, 2.0][: len(lengths)]
    bounds = np.cumsum([0, *map(len, lengths)])
    samples = lists(draw(lengths, weights, order, count))
    for source, (part, weight) in enumerate(zip(lengths, weights, strict=True)):
        own = range(bounds[source], bounds[source + 1])
        mine = [[item - own.start for item in sample] for sample in samples if sample[0] in own]
        assert abs(len(mine) - count * weight / sum(weights)) <= 2
        assert mine == lists(draw([part], None, order, len(mine)))
    assert samples == lists(draw(lengths, weights, order, count + 5))[:count]


def test_one_epoch_of_weights_is_refused():
    with pytest.raises(DataError, match=r"weights \[1, 2\] need a number of samples"):
        draw([np.array([1])] * 2, [1, 2], SampleOrder(SEQ_LENGTH, 0, True, True), None)
