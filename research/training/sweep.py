"""Reads a learning rate off the losses of a training in which it rose."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

MEMORY = 0.9  # the share of itself that the smoothed loss keeps in a step
UNSETTLED = 10  # steps in which few losses are in the average
FEWEST = UNSETTLED + 3  # steps that a suggestion takes
DIVERGED = 4.0  # times the least loss so far


@dataclasses.dataclass(frozen=True)
class Sweep:
    """How a group of variables learned while its learning rate rose.

    Attributes:
      group: its name as people see it.
      rates: the learning rates.
      losses: the training loss at each, in nats, smoothed.
      suggestion: where the loss falls fastest; None if it never falls.
    """

    group: str
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    suggestion: float | None

    @property
    def why_none(self) -> str:
        """Why there is no suggestion, in a few words."""
        if len(self.rates) < FEWEST:
            return f"as the loss rose far or became infinite within {len(self.rates) + 1} steps"
        return "as the loss does not fall"


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
      None where the loss does not fall.
    """
    if len(losses) < FEWEST:
        return None
    settled, among = np.asarray(losses[UNSETTLED:]), rates[UNSETTLED:]
    lowest = int(np.argmin(settled))
    if lowest < 2 or settled[lowest] >= settled[0]:
        return None
    slopes = np.gradient(settled, np.log(np.asarray(among)))
    return float(among[int(np.argmin(slopes[: lowest + 1]))])
