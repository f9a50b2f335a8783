"""The timeline of a step agrees with theory and with what a rank may do."""

from itertools import pairwise

import pytest

from megalite.pipeline.actions import Backward, BackwardInput, BackwardWeight, Forward
from megalite.pipeline.orders import RULES
from megalite.pipeline.schedule import orders_of
from megalite.pipeline.timeline import Durations, bubble_fraction, idle, play

# Of a rank in p ranks and v chunks, by the durations of F, I and W: Narayanan 2021, section 2.2; Qi 2023,
# table 1, for W <= F, I; Qi 2024, for W <= F <= I and at least 2p - 1 micro batches.
IDLE = {
    "afab": lambda p, v, f, i, w: (p - 1) * (f + i + w),
    "1f1b": lambda p, v, f, i, w: (p - 1) * (f + i + w),
    "interleaved": lambda p, v, f, i, w: (p - 1) * (f + i + w) / v,
    "zb-h1": lambda p, v, f, i, w: (p - 1) * (f + i - w),
    "zbv": lambda p, v, f, i, w: (p - 1) * max(f, i) / 2,
}


@pytest.mark.parametrize("durations", [(1, 1, 1), (1, 1.3, 0.9), (0.8, 1, 0.5)])
@pytest.mark.parametrize(("name", "num_chunks"), [*((name, None) for name in RULES), ("interleaved", 4)])
def test_every_rank_waits_as_long_as_published(name, num_chunks, durations):
    for num_ranks in range(1, 9):
        for num_micro_batches in (2 * num_ranks, 3 * num_ranks):
            orders, placement = orders_of(name, num_ranks, num_micro_batches, num_chunks)
            intervals = play(orders, placement, Durations(*durations))
            expected = IDLE[name](num_ranks, placement.num_chunks, *durations)
            assert [idle(intervals, rank) for rank in range(num_ranks)] == pytest.approx(
                [expected] * num_ranks, abs=1e-9
            )


@pytest.mark.parametrize("name", ["1f1b", "afab"])
@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_the_bubble_is_p_minus_1_over_m_plus_p_minus_1(name, num_ranks):
    for num_micro_batches in range(1, 17):
        expected = (num_ranks - 1) / (num_micro_batches + num_ranks - 1)
        assert bubble_fraction(play(*orders_of(name, num_ranks, num_micro_batches))) == pytest.approx(
            expected
        )


@pytest.mark.parametrize("name", RULES)
def test_a_rank_computes_one_thing_at_a_time_and_every_input_is_ready(name):
    orders, placement = orders_of(name, 4, 8)
    intervals = play(orders, placement)
    end = {
        (type(a), placement.stage(i.rank, a.chunk), a.micro_batch): i.end
        for i in intervals
        for a in [i.action]
    }
    assert len(intervals) == len(end) == sum(map(len, orders))
    for before, after in pairwise(intervals):
        assert before.rank < after.rank or before.end <= after.start
    for start, _, rank, action in intervals:
        stage = placement.stage(rank, action.chunk)
        needed = {
            Forward: (Forward, stage - 1, action.micro_batch),
            Backward: (Backward, stage + 1, action.micro_batch),
            BackwardInput: (BackwardInput, stage + 1, action.micro_batch),
            BackwardWeight: (BackwardInput, stage, action.micro_batch),
        }[type(action)]
        assert end.get(needed, 0) <= start and (needed in end) == (0 <= needed[1] < placement.num_stages)


def test_two_ranks_and_two_micro_batches_written_out_by_hand():
    assert play(*orders_of("1f1b", 2, 2)) == [
        (0, 1, 0, Forward(0)),
        (1, 2, 0, Forward(1)),
        (4, 6, 0, Backward(0)),
        (7, 9, 0, Backward(1)),
        (1, 2, 1, Forward(0)),
        (2, 4, 1, Backward(0)),
        (4, 5, 1, Forward(1)),
        (5, 7, 1, Backward(1)),
    ]
