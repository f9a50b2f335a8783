"""The timeline of a step agrees with theory and with what a stage may do."""

from itertools import pairwise

import pytest

from megalite.pipeline.timeline import bubble_fraction, timeline


@pytest.mark.parametrize("name", ["1f1b", "afab"])
@pytest.mark.parametrize("num_stages", range(1, 9))
def test_the_bubble_is_p_minus_1_over_m_plus_p_minus_1(name, num_stages):
    for num_micro_batches in range(1, 17):
        expected = (num_stages - 1) / (num_micro_batches + num_stages - 1)
        assert bubble_fraction(timeline(name, num_stages, num_micro_batches)) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["1f1b", "afab"])
def test_a_stage_computes_one_thing_at_a_time_and_every_input_is_ready(name):
    intervals = timeline(name, 4, 8)
    end = {(i.stage, i.kind, i.micro_batch): i.end for i in intervals}
    assert len(intervals) == len(end) == 4 * 8 * 2
    for before, after in pairwise(intervals):
        assert before.stage < after.stage or before.end <= after.start
    for i in intervals:
        source = i.stage - 1 if i.kind == "forward" else i.stage + 1
        assert end.get((source, i.kind, i.micro_batch), 0) <= i.start


def test_two_stages_and_two_micro_batches_written_out_by_hand():
    assert timeline("1f1b", 2, 2) == [
        (0, 1, 0, "forward", 0),
        (1, 2, 0, "forward", 1),
        (4, 6, 0, "backward", 0),
        (7, 9, 0, "backward", 1),
        (1, 2, 1, "forward", 0),
        (2, 4, 1, "backward", 0),
        (4, 5, 1, "forward", 1),
        (5, 7, 1, "backward", 1),
    ]
