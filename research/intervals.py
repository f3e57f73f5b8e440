"""How sure a figure of some photos is: 95 % intervals, of shares and by resampling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

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


def wilson_interval(successes: float, trials: float, z: float = 1.959964) -> Interval | None:
    """Returns the Wilson score interval of a proportion (Wilson 1927); 95 % by default.

    Args:
      successes: 0 to `trials`.
      trials: how many; None is returned for none.
      z: standard normal quantile of the interval's upper end.
    """
    if not trials:
        return None
    share = successes / trials
    centre = share + z * z / (2 * trials)
    margin = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low, high = (centre - margin) / scale, (centre + margin) / scale
    return max(0.0, float(low)), min(1.0, float(high))
