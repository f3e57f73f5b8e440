"""`Meter`: metrics of some training steps, their time, and the time they waited for input."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from research.tasks.metrics import Metrics, SumsRead

MakeMetrics = Callable[[SumsRead], Metrics]


@dataclasses.dataclass(frozen=True)
class Interval:
    """Figures of some consecutive training steps.

    Attributes:
      metrics: means over the photos of these steps.
      photos: the number of photos that this process trained on.
      seconds: their duration.
      waiting_seconds: the part of it spent waiting for input.
    """

    metrics: Metrics
    photos: float
    seconds: float
    waiting_seconds: float

    @property
    def photos_per_second(self) -> float:
        """The speed of training, for this process."""
        return self.photos / self.seconds if self.seconds else 0.0

    @property
    def waiting_share(self) -> float:
        """The share of the time that was spent waiting for input, in [0, 1]."""
        return self.waiting_seconds / self.seconds if self.seconds else 0.0


class Meter:
    """Measures an epoch.

    Args:
      sums: those of the epoch so far; not zero if the run was resumed within the epoch.
      metrics: computes metrics from sums.
    """

    def __init__(self, sums: SumsRead, metrics: MakeMetrics) -> None:
        self._metrics = metrics
        self._waiting = 0.0
        self._first = self._last = (time.perf_counter(), 0.0, sums)

    def waited(self, seconds: float) -> None:
        """Counts time that training waited for input."""
        self._waiting += seconds

    def interval(self, sums: SumsRead) -> Interval:
        """Returns the figures since the last call, from the epoch's sums so far."""
        begin, waiting, before = self._last
        self._last = (time.perf_counter(), self._waiting, sums)
        fresh = {name: value - before[name] for name, value in sums.items()}
        metrics = self._metrics(fresh)
        return Interval(metrics, metrics.photos, self._last[0] - begin, self._waiting - waiting)

    def epoch(self, sums: SumsRead) -> Interval:
        """Returns the figures of the whole epoch; its speed is that of this process's steps."""
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
