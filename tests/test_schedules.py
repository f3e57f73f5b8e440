from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import tensorflow as tf

from research.optimization.schedules import Rising, Schedule, SequentialSchedule, Shape


def test_constant():
    schedule = Schedule("constant", 0.1, 0, 100)
    assert [float(schedule(step)) for step in (0, 50, 99)] == pytest.approx([0.1] * 3)


def test_cosine_falls_from_the_peak_to_zero():
    schedule = Schedule("cosine", 0.2, 0, 100)
    assert float(schedule(0)) == pytest.approx(0.2)
    assert float(schedule(25)) == pytest.approx(0.1 * (1 + math.cos(math.pi / 4)))
    assert float(schedule(50)) == pytest.approx(0.1)
    assert float(schedule(100)) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("shape", ["constant", "cosine"])
def test_warm_up_rises_linearly_from_the_groups_first_step(shape):
    schedule = Schedule(shape, 1.0, first_step=10, last_step=1010, warmup_steps=4)
    rates = [float(schedule(step)) for step in range(9, 15)]
    np.testing.assert_allclose(rates, [0, 0.25, 0.5, 0.75, 1, 1], rtol=1e-4)


def test_one_cycle_rises_for_a_quarter_and_falls_to_almost_zero():
    schedule = Schedule("one_cycle", 1.0, first_step=50, last_step=150)
    assert float(schedule(49)) == 0
    assert float(schedule(50)) == pytest.approx(1 / 25)
    halfway_up = 1 / 25 + (1 - 1 / 25) / 2 * (1 - math.cos(math.pi * 12 / 25))
    assert float(schedule(62)) == pytest.approx(halfway_up, rel=1e-4)
    assert float(schedule(75)) == pytest.approx(1.0, rel=1e-5)
    assert float(schedule(125)) == pytest.approx(0.5 * (1 + math.cos(math.pi * 2 / 3)), rel=1e-3)
    assert float(schedule(150)) == pytest.approx(1e-5, rel=1e-2)


def test_staircase_is_divided_by_ten_three_times():
    schedule = Schedule("staircase", 1.0, 0, 100, warmup_steps=10)
    rates = [float(schedule(step)) for step in (4, 9, 29, 30, 59, 60, 89, 90)]
    np.testing.assert_allclose(rates, [0.5, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.001], rtol=1e-5)


def test_one_schedule_after_another():
    both = SequentialSchedule(Schedule("cosine", 1.0, 0, 10), Schedule("cosine", 0.1, 10, 30))
    rates = [float(both(step)) for step in (0, 5, 10, 20)]
    np.testing.assert_allclose(rates, [1.0, 0.5, 0.1, 0.05], rtol=1e-5)
    assert str(both) == "1 then 0.1, cosine"


def test_a_rising_rate_is_geometric():
    rising = Rising(1e-4, 1.0, first_step=7, last_step=12)
    np.testing.assert_allclose(
        [float(rising(step)) for step in range(7, 12)], [1e-4, 1e-3, 1e-2, 0.1, 1], rtol=1e-4
    )


def test_a_factor_may_be_an_object_and_return_float64():
    class Falling:
        def __call__(self, share):
            return 1.0 - tf.cast(share, tf.float64)

    for factor, name in ((Falling(), "Falling"), (functools.partial(pow, 0.5), "partial")):
        schedule = Schedule(Shape(factor), 0.2, 0, 100)
        assert str(schedule) == f"0.2, {name}"
        assert schedule(0).dtype == tf.float32
    assert float(Schedule(Shape(Falling()), 0.2, 0, 100)(50)) == pytest.approx(0.1)
