"""Reads a learning rate off the losses of a training in which it rose."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

MEMORY = 0.9  # the share of itself that the smoothed loss keeps in a step
DIVERGED = 4.0  # times the least loss so far


@dataclasses.dataclass(frozen=True)
class Sweep:
    """How a group of variables learned while its learning rate rose.

    Attributes:
      group: its name.
      rates: the learning rates.
      losses: the training loss at each, in nats, smoothed.
      suggestion: where the loss falls fastest; None if it never falls.
    """

    group: str
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    suggestion: float | None


def smooth(losses: Sequence[float]) -> tuple[float, ...]:
    """Returns an exponential moving average, corrected for its beginning as Adam's is."""
    smoothed, average = [], 0.0
    for count, loss in enumerate(losses, start=1):
        average = MEMORY * average + (1 - MEMORY) * loss
        smoothed.append(average / (1 - MEMORY**count))
    return tuple(smoothed)


def suggest_rate(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """Returns the rate at which the loss falls fastest (Smith 2017, arXiv 1506.01186).

    Args:
      rates: rising geometrically.
      losses: smoothed, one a rate.

    Returns:
      None where the loss is not lower anywhere than at the lowest rate.
    """
    lowest = int(np.argmin(losses))
    if lowest < 2 or losses[lowest] >= losses[0]:
        return None
    slopes = np.gradient(np.asarray(losses), np.log(np.asarray(rates)))
    return float(rates[int(np.argmin(slopes[: lowest + 1]))])
