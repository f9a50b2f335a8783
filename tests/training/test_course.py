"""Which samples a step takes, against a search by hand."""

import random

import pytest

from megalite.training.course import Course


def starts_by_hand(batch, consumed, left_out, num_steps):
    """Walk on sample by sample: a batch begins at the first place from which nothing of it is left out."""
    banned = {sample for first, end in left_out for sample in range(first, end)}
    place, starts = consumed, []
    for _ in range(num_steps):
        while any(place + i in banned for i in range(batch)):
            place += 1
        starts.append(place)
        place += batch
    return starts


@pytest.mark.parametrize("seed", range(200))
def test_each_step_takes_the_next_samples_that_are_not_left_out(seed):
    draw = random.Random(seed)
    batch, consumed, step = draw.randint(1, 6), draw.randint(0, 12), draw.randint(0, 5)
    edges = sorted(draw.sample(range(80), 2 * draw.randint(0, 5)))
    left_out = tuple(zip(edges[::2], edges[1::2], strict=True))
    course = Course(batch, step, consumed, left_out)
    expected = starts_by_hand(batch, consumed, left_out, 20)
    steps = range(step + 1, step + 21)
    assert [course.start_of(s) for s in steps] == expected
    assert [course.end_of(s) for s in steps] == [start + batch for start in expected]
    assert course.end_of(step) == consumed

    left = draw.choice(steps)
    place = course.start_of(left)
    assert [course.without(left).start_of(s) for s in steps] == starts_by_hand(
        batch, consumed, (*left_out, (place, place + batch)), 20
    )
    saved = {"step": left, **course.state(left)}
    after = Course.after(saved, batch)
    assert [after.start_of(s) for s in steps if s > left] == [course.start_of(s) for s in steps if s > left]


def test_a_run_without_a_checkpoint_begins_at_its_first_sample():
    assert [Course.after({}, 4).start_of(step) for step in (1, 2, 3)] == [0, 4, 8]
    assert Course(4).state(3) == {"consumed_samples": 12}
