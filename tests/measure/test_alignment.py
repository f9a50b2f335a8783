"""How far two clocks are apart is known to within what their meetings leave open."""

import random
from itertools import pairwise

import pytest

from megalite.measure.alignment import clock_offset

AHEAD = (0.0, 1234.5, -0.0002)


def meetings(ahead, seed, num_meetings=30):
    """Of two ranks, each by its own clock; nobody leaves before both have come, each is held up at will."""
    source = random.Random(seed)
    mine, others, now = [], [], 0.0
    for _ in range(num_meetings):
        came = [now + source.expovariate(1000) for _ in range(2)]
        left = [max(came) + 1e-4 + source.expovariate(1000) for _ in range(2)]
        mine.append((came[0] + ahead, left[0] + ahead))
        others.append((came[1], left[1]))
        now = max(left)
    return mine, others


@pytest.mark.parametrize("ahead", AHEAD)
def test_the_truth_is_within_the_error_which_shrinks_as_they_meet(ahead):
    for seed in range(50):
        mine, others = meetings(ahead, seed)
        found = [clock_offset(mine[:n], others[:n]) for n in (1, 5, 30)]
        for offset in found:
            assert abs(offset.seconds - ahead) <= offset.error_seconds
        assert all(more.error_seconds <= fewer.error_seconds for fewer, more in pairwise(found))
        assert found[-1].error_seconds < 1e-3


def test_control_a_clock_that_jumps_between_meetings_is_noticed():
    mine, others = meetings(0.0, seed=1)
    mine[15:] = [(came + 1, left + 1) for came, left in mine[15:]]
    with pytest.raises(ValueError, match="it has jumped"):
        clock_offset(mine, others)
