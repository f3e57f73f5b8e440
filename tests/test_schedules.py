from __future__ import annotations

import math

import numpy as np
import pytest

from research.schedules import Schedule


def test_constant():
    schedule = Schedule("constant", 0.1, 0, 100)
    assert [float(schedule(step)) for step in (0, 50, 99)] == pytest.approx([0.1] * 3)


def test_cosine_falls_from_its_peak_to_zero():
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
