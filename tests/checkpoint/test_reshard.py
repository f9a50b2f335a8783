"""Any cut of a tensor is copied to any other cut of it, exactly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.checkpoint.format import CheckpointError, PieceRow, Region
from megalite.checkpoint.reshard import check_coverage, overlaps
from tests.checkpoint.worlds import Cut, cut_tensor

SHAPES = st.lists(st.integers(1, 7), min_size=0, max_size=3).map(tuple)


def borders(max_parts: int) -> st.SearchStrategy[tuple[float, ...]]:
    inner = st.lists(st.floats(0, 1), max_size=max_parts - 1)
    return inner.map(lambda values: (0.0, *sorted(values), 1.0))


@st.composite
def shapes_and_two_cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], Cut, Cut]:
    shape = draw(SHAPES)
    dims = st.sampled_from([None, *range(len(shape))])
    source, target = (Cut(draw(dims), draw(borders(4)), draw(borders(4))) for _ in range(2))
    return shape, source, target


@settings(max_examples=400, deadline=None, derandomize=True)
@given(shapes_and_two_cuts())
def test_any_source_cut_fills_any_target_cut_with_the_same_values(case):
    shape, source_cut, target_cut = case
    full = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    sources = [piece for piece in cut_tensor(full, "weight", "w", source_cut) if piece.owned]
    for target in cut_tensor(full, "weight", "w", target_cut):
        filled = torch.full_like(target.tensor, -1)
        num_copied = 0
        for source in sources:
            for there, here in overlaps(source.region, target.region):
                values = source.tensor[there.start : there.stop].view(there.shape)[there.cut]
                filled[here.start : here.stop].view(here.shape)[here.cut].copy_(values)
                num_copied += values.numel()
        assert filled.equal(target.tensor)
        assert num_copied == target.tensor.numel()  # each element once


def test_a_range_in_the_middle_of_rows_meets_columns_in_three_rectangles():
    # rows 0..3 of 5; elements 3..13 are the end of row 0, row 1, and the start of row 2; columns 1..3 of it
    source = Region((0, 0), (4, 5), 3, 11)
    target = Region((0, 1), (4, 3), 0, 12)
    assert [here.stop - here.start for _, here in overlaps(source, target)] == [3, 3, 3]
    assert [here.cut for _, here in overlaps(source, target)] == [
        (slice(None), slice(2, 3)),
        (slice(None), slice(0, 3)),
        (slice(None), slice(0, 3)),
    ]


def test_equal_boxes_meet_in_one_plain_range():
    (there, here), *rest = overlaps(Region((2, 0), (4, 5), 3, 10), Region((2, 0), (4, 5), 8, 12))
    assert not rest and (there.start, there.stop, here.start, here.stop) == (5, 10, 0, 5)


def row(start: int, size: int, box: tuple[tuple[int, ...], tuple[int, ...]] = ((0, 0), (4, 5))) -> PieceRow:
    return PieceRow("key", "weight", "w", (4, 5), Region(*box, start, size))


def test_pieces_that_hold_each_element_once_are_accepted():
    check_coverage([row(13, 7), row(0, 13)])
    check_coverage([row(0, 8, ((0, 0), (4, 2))), row(0, 12, ((0, 2), (4, 3)))])


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([row(0, 13), row(14, 6)], "hold 19 of 20 elements"),
        ([row(0, 14), row(13, 7)], "two pieces hold the same elements"),
        ([row(0, 20), row(0, 20)], "two pieces hold the same elements"),
        ([row(0, 8, ((0, 0), (4, 2))), row(0, 16, ((0, 1), (4, 4)))], "two pieces hold the same"),
        ([row(0, 8, ((0, 0), (4, 2)))], "hold 8 of 20 elements"),
        ([row(0, 20), row(0, 20)._replace(full_shape=(5, 4))], "more than one full shape"),
    ],
    ids=["gap", "overlap", "twice", "overlapping boxes", "missing box", "two shapes"],
)
def test_pieces_that_miss_or_repeat_elements_are_refused(pieces, message):
    with pytest.raises(CheckpointError, match=message):
        check_coverage(pieces)
