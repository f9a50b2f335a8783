from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.config.optimizer import OptimizerConfig
from megalite.config.schedule import ScheduleConfig
from megalite.training.lr_schedule import learning_rate_at

PEAK, LOW = 1e-3, 1e-4
DECAYS = ["cosine", "linear", "constant", "wsd"]


def curve(**schedule):
    config = ScheduleConfig(min_learning_rate=LOW, **schedule)
    optimizer = OptimizerConfig(learning_rate=PEAK)
    return [learning_rate_at(step, config, optimizer) for step in range(1, config.num_steps + 1)]


@pytest.mark.parametrize("decay", DECAYS)
def test_warm_up_learns_from_the_first_step_and_ends_at_the_peak(decay):
    rates = curve(decay=decay, num_steps=100, warmup_steps=10)
    assert rates[:10] == pytest.approx([PEAK * step / 10 for step in range(1, 11)])


@pytest.mark.parametrize("decay", ["cosine", "linear", "wsd"])
def test_the_last_step_is_at_the_minimum_and_no_step_before(decay):
    rates = curve(decay=decay, num_steps=100, warmup_steps=10)
    assert rates[-1] == pytest.approx(LOW)
    assert rates[-2] > rates[-1]


def test_constant_stays():
    assert curve(decay="constant", num_steps=30, warmup_steps=3)[2:] == [PEAK] * 28


def test_half_way_through_the_decay_is_half_way_down():
    for decay in ("cosine", "linear"):
        assert curve(decay=decay, num_steps=110, warmup_steps=10)[59] == pytest.approx((PEAK + LOW) / 2)


def test_a_quarter_of_cosine_is_above_a_quarter_of_linear():
    cosine, linear = (
        curve(decay=decay, num_steps=110, warmup_steps=10)[34] for decay in ("cosine", "linear")
    )
    assert cosine == pytest.approx(LOW + (PEAK - LOW) * 0.8535533905932737)
    assert linear == pytest.approx(LOW + (PEAK - LOW) * 0.75)


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_decay_steps_may_end_before_the_run(decay):
    rates = curve(decay=decay, num_steps=100, warmup_steps=10, decay_steps=40)
    assert rates[48] > LOW
    assert rates[49:] == pytest.approx([LOW] * 51)


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_decay_steps_may_end_after_the_run(decay):
    rates = curve(decay=decay, num_steps=100, warmup_steps=10, decay_steps=180)
    assert rates[-1] == pytest.approx((PEAK + LOW) / 2)


@pytest.mark.parametrize(("decay_steps", "length"), [(25, 25), (None, 10)])
def test_wsd_stays_and_then_falls_at_the_end(decay_steps, length):
    rates = curve(decay="wsd", num_steps=100, warmup_steps=10, decay_steps=decay_steps)
    assert rates[9 : 100 - length] == [PEAK] * (91 - length)
    assert rates[100 - length] == pytest.approx(PEAK - (PEAK - LOW) / length)


def test_wsd_does_not_fall_before_warm_up_is_over():
    late = {"num_steps": 100, "warmup_steps": 80, "decay_steps": 50}
    assert curve(decay="wsd", **late) == curve(decay="linear", **{**late, "decay_steps": None})


@settings(deadline=None)
@given(
    decay=st.sampled_from(DECAYS),
    num_steps=st.integers(1, 60),
    warmup_steps=st.integers(0, 70),
    decay_steps=st.none() | st.integers(1, 80),
)
def test_rates_rise_in_warm_up_and_never_after(decay, num_steps, warmup_steps, decay_steps):
    decay_steps = None if decay == "constant" else decay_steps
    rates = curve(decay=decay, num_steps=num_steps, warmup_steps=warmup_steps, decay_steps=decay_steps)
    assert all(before < after for before, after in pairwise(rates[:warmup_steps]))
    assert all(before >= after for before, after in pairwise(rates[max(warmup_steps - 1, 0) :]))
    assert all(0 < rate <= PEAK for rate in rates)
    assert all(rate >= LOW * (1 - 1e-12) for rate in rates[warmup_steps:])
