"""What stays of a run's checkpoints."""

import pytest

from megalite.checkpoint.retention import Retention

LOSSES = {10: 3.0, 20: 1.0, 30: None, 40: 1.0, 50: 2.0}
STEPS = list(LOSSES)


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(), STEPS),
        (Retention(last=0, every_steps=20, best=1), STEPS),
        (Retention(last=1), [50]),
        (Retention(last=2), [40, 50]),
        (Retention(last=9), STEPS),
        (Retention(last=1, every_steps=20), [20, 40, 50]),
        (Retention(last=1, best=1), [20, 50]),
        (Retention(last=1, best=2), [20, 40, 50]),
        (Retention(last=1, best=3), [20, 40, 50]),
        (Retention(last=1, every_steps=30, best=1), [20, 30, 50]),
    ],
    ids=str,
)
def test_what_stays(retention, kept):
    superseded = retention.superseded(STEPS, LOSSES.get)
    assert [step for step in STEPS if step not in superseded] == kept
    assert retention.superseded([], LOSSES.get) == []
