from __future__ import annotations

import time

import pytest

from research.meter import Meter
from research.metrics import SumsRead


def slow_batches(seconds):
    for index in range(3):
        time.sleep(seconds)
        yield index


def test_intervals_are_differences_and_the_epoch_is_the_whole():
    meter = Meter(SumsRead(2.0, 1.0, 4.0))  # four photos before the run was resumed
    first = meter.interval(SumsRead(6.0, 5.0, 12.0))
    assert (first.metrics.loss, first.metrics.accuracy, first.photos) == (0.5, 0.5, 8)
    second = meter.interval(SumsRead(6.0, 7.0, 14.0))
    assert (second.metrics.loss, second.metrics.accuracy, second.photos) == (0.0, 1.0, 2)
    whole = meter.epoch(SumsRead(6.0, 7.0, 14.0))
    assert whole.metrics.photos == 14
    assert whole.photos == 10
    assert whole.metrics.accuracy == 0.5


def test_time_spent_waiting_for_input_is_told_from_time_spent_otherwise():
    meter = Meter(SumsRead(0, 0, 0))
    seen = []
    for batch in meter.timed(slow_batches(0.02)):
        seen.append(batch)
        time.sleep(0.01)
    interval = meter.interval(SumsRead(0, 0, 3))
    assert seen == [0, 1, 2]
    assert interval.waiting_seconds == pytest.approx(0.06, rel=0.5)
    assert 0.4 < interval.waiting_share < 0.9
    assert interval.photos_per_second == pytest.approx(3 / interval.seconds)
