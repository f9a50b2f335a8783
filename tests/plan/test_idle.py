"""The idle time that a plan reckons with is that of the schedules' own lists."""

import pytest

from megalite.pipeline.orders import RULES
from megalite.pipeline.placement import Placement
from megalite.pipeline.schedule import orders_of
from megalite.pipeline.timeline import play
from megalite.plan.idle import StageCosts, idle_seconds, play_step

TIMES = [
    (1.0, 1.0, 1.0),
    (1.0, 1.3, 0.9),
    (0.8, 1.0, 0.5),
]  # forward, input, weight, as the formulas want them


def alike(num_ranks, num_chunks, forward, backward_input, weight):
    """Costs of a pipeline in which all stages are alike."""
    stages = num_ranks * num_chunks
    return StageCosts(*([seconds / num_chunks] * stages for seconds in (forward, backward_input, weight)))


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize(
    ("name", "chunks"), [*((n, RULES[n].num_chunks or 2) for n in RULES), ("interleaved", 4)]
)
def test_the_formula_is_what_every_rank_waits_by_the_schedules_lists(name, chunks, times):
    for p in (1, 2, 3, 4, 6):
        played = play_step(name, p, 2 * p, chunks, alike(p, chunks, *times))
        expected = pytest.approx(idle_seconds(name, p, chunks, *times), abs=1e-9)
        assert [played.waiting_seconds(rank) for rank in range(p)] == [expected] * p


@pytest.mark.parametrize(
    ("name", "expected"), [("1f1b", 9.0), ("afab", 9.0), ("interleaved", 4.5), ("zb-h1", 3.0), ("zbv", 1.5)]
)
def test_four_ranks_wait_as_long_as_written_out(name, expected):
    """Of a rank, in units of a forward; F = I = W = 1: 3 x 3, a half of it, 3 x 1, 3 / 2."""
    assert idle_seconds(name, 4, RULES[name].num_chunks or 2, 1.0, 1.0, 1.0) == expected


def test_a_slow_stage_holds_the_others_up():
    even = StageCosts([1.0] * 4, [1.0] * 4, [1.0] * 4)
    uneven = StageCosts([1.0, 1.0, 1.0, 2.0], [1.0] * 4, [1.0] * 4)
    before, after = (play_step("1f1b", 4, 8, 1, costs) for costs in (even, uneven))
    assert after.seconds == before.seconds + 8  # each of eight micro batches is one longer on the last rank
    assert after.waiting_seconds(3) < before.waiting_seconds(3) + 1e-9 < after.waiting_seconds(0)


def test_transfers_count_on_the_way_there_and_back():
    costs = StageCosts([1.0, 1.0], [1.0, 1.0], [1.0, 1.0])
    without, with_transfers = (play_step("1f1b", 2, 1, 1, costs, seconds).seconds for seconds in (0.0, 0.25))
    assert with_transfers == without + 2 * 0.25


def test_a_chunk_handed_over_on_its_own_rank_is_no_transfer():
    orders, placement = orders_of("zbv", 2, 1, 2)
    assert placement == Placement(2, 2, is_v=True)
    without, with_transfers = (
        max(i.end for i in play(orders, placement, transfer_seconds=s)) for s in (0, 1)
    )
    assert with_transfers == without + 4  # of six ways between four stages, rank 1 keeps two to itself
