"""`Meter`: the metrics, the speed and the input waiting time of training steps."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from research.tasks.metrics import Metrics, SumsRead

MakeMetrics = Callable[[SumsRead], Metrics]


@dataclasses.dataclass(frozen=True)
class Interval:
    """Metrics and speed of consecutive training steps.

    Attributes:
      metrics: means over the photos of these steps.
      photos: number of photos in the steps that this process ran.
      seconds: duration of these steps.
      waiting_seconds: the part of `seconds` spent waiting for input.
    """

    metrics: Metrics
    photos: float
    seconds: float
    waiting_seconds: float

    @property
    def photos_per_second(self) -> float:
        """The speed of the steps that this process ran."""
        return self.photos / self.seconds if self.seconds else 0.0

    @property
    def waiting_share(self) -> float:
        """The share of the time that was spent waiting for input, in [0, 1]."""
        return self.waiting_seconds / self.seconds if self.seconds else 0.0


class Meter:
    """Measures the metrics and the speed of an epoch.

    Args:
      sums: the sums of the epoch so far. They are not zero if the run resumes within an epoch.
      metrics: computes metrics from sums.
    """

    def __init__(self, sums: SumsRead, metrics: MakeMetrics) -> None:
        self._metrics = metrics
        self._waiting = 0.0
        self._first = self._last = (time.perf_counter(), 0.0, sums)

    def waited(self, seconds: float) -> None:
        """Adds time spent waiting for input."""
        self._waiting += seconds

    def interval(self, sums: SumsRead) -> Interval:
        """Returns metrics and speed since the last call, from the sums of the epoch so far."""
        begin, waiting, before = self._last
        self._last = (time.perf_counter(), self._waiting, sums)
        difference = {name: value - before[name] for name, value in sums.items()}
        metrics = self._metrics(difference)
        return Interval(metrics, metrics.photos, self._last[0] - begin, self._waiting - waiting)

    def epoch(self, sums: SumsRead) -> Interval:
        """Returns the metrics of the whole epoch, and the speed of the steps of this process."""
        begin, _, before = self._first
        photos = float(sums["weight"] - before["weight"])
        return Interval(self._metrics(sums), photos, time.perf_counter() - begin, self._waiting)


class Stopwatch:
    """Measures the time between calls."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()

    def lap(self) -> float:
        """Returns the seconds since the last lap and begins a new one."""
        begin, self._begin = self._begin, time.perf_counter()
        return self._begin - begin
