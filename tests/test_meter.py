from __future__ import annotations

import numpy as np
import pytest

from research.loop.meter import Interval, Meter
from research.tasks.metrics import Metrics, SumsRead, mean_metrics
from research.tasks.task import Task


def sums(loss: float, accuracy: float, weight: float) -> SumsRead:
    values = {"loss": loss, "accuracy": accuracy, "weight": weight}
    return {name: np.array(float(value)) for name, value in values.items()}


def metrics_of(read: SumsRead) -> Metrics:
    return mean_metrics(read, Task().figures)


def test_intervals_are_differences_and_the_epoch_is_the_whole():
    meter = Meter(sums(2.0, 1.0, 4.0), metrics_of)  # four photos before the run was resumed
    first = meter.interval(sums(6.0, 5.0, 12.0))
    assert (first.metrics.loss, first.metrics["accuracy"], first.photos) == (0.5, 0.5, 8)
    second = meter.interval(sums(6.0, 7.0, 14.0))
    assert (second.metrics.loss, second.metrics["accuracy"], second.photos) == (0.0, 1.0, 2)
    whole = meter.epoch(sums(6.0, 7.0, 14.0))
    assert whole.metrics.photos == 14
    assert whole.photos == 10
    assert whole.metrics["accuracy"] == 0.5


def test_time_spent_waiting_for_input_is_told_from_time_spent_otherwise():
    meter = Meter(sums(0, 0, 0), metrics_of)
    meter.waited(5.0)
    meter.waited(7.0)
    interval = meter.interval(sums(0, 0, 3))
    assert interval.waiting_seconds == 12
    assert interval.photos_per_second == pytest.approx(3 / interval.seconds)
    assert meter.interval(sums(0, 0, 3)).waiting_seconds == 0
    assert meter.epoch(sums(0, 0, 3)).waiting_seconds == 12


def test_the_share_of_waiting():
    assert Interval(metrics_of(sums(0, 0, 1)), 1, 4.0, 1.0).waiting_share == 0.25
