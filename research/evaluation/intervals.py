"""How sure a figure of some photos is: 95 % intervals, of shares and by resampling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

Interval = tuple[float, float]


def resampled_rows(count: int, resamples: int) -> list[np.ndarray]:
    """Returns rows drawn with replacement, the same ones each time: what is compared is paired."""
    generator = np.random.default_rng(0)
    return [generator.integers(count, size=count) for _ in range(resamples)]


def percentiles(drawn: Sequence[float] | np.ndarray) -> Interval | None:
    """Returns the middle 95 % of what resamples gave; None if none gave anything."""
    finite = [value for value in drawn if not math.isnan(value)]
    if not finite:
        return None
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)


def wilson_interval(successes: float, trials: float) -> Interval | None:
    """Returns the 95 % Wilson score interval of a proportion (Wilson 1927), None of no trials."""
    if not trials:
        return None
    interval = stats.binomtest(round(successes), round(trials)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)
