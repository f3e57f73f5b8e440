"""Learning rates as pure functions of the step. `SCHEDULES` is the table that the flags read.

This module must stay free of TensorFlow until a rate is computed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import tensorflow as tf

# Of a cycle: the share of it that rises, and what the peak is divided by at its begin and end.
RISING_SHARE, FIRST_DIVISOR, LAST_DIVISOR = 0.25, 25.0, 1e5
STAIRS = (0.3, 0.6, 0.9)


class Shape(NamedTuple):
    """How a learning rate changes over time.

    Attributes:
      factor: maps a share of the steps, a float32 scalar in [0, 1], to a factor of the peak.
      after_warmup: whether the share is of the steps after the warm-up, or of all.
      warms_up: whether the rate rises linearly in the warm-up; False where the shape itself rises.
    """

    factor: Callable[[tf.Tensor], tf.Tensor | float]
    after_warmup: bool = True
    warms_up: bool = True


def constant(share: tf.Tensor) -> float:
    """Stays at the peak."""
    return 1.0


def cosine(share: tf.Tensor) -> tf.Tensor:
    """Falls to zero along half a cosine (Loshchilov and Hutter 2017, arXiv 1608.03983)."""
    return _half_cosine(1.0, 0.0, share)


def one_cycle(share: tf.Tensor) -> tf.Tensor:
    """Rises from a 25th of the peak in the first quarter, then falls to nearly nothing.

    Smith and Topin 2018, arXiv 1708.07120, in fastai's form, without the cycle of momentum.
    """
    import tensorflow as tf

    rising = _half_cosine(1 / FIRST_DIVISOR, 1.0, share / RISING_SHARE)
    falling = _half_cosine(1.0, 1 / LAST_DIVISOR, (share - RISING_SHARE) / (1 - RISING_SHARE))
    return tf.where(share < RISING_SHARE, rising, falling)


def staircase(share: tf.Tensor) -> tf.Tensor:
    """Falls to a tenth after 30, 60 and 90 % (Kolesnikov et al. 2020, arXiv 1912.11370)."""
    import tensorflow as tf

    return 0.1 ** tf.add_n([tf.cast(share >= stair, tf.float32) for stair in STAIRS])


# One entry adds one; a function of the user's own, given as FILE.py:NAME, becomes a `Shape` too.
SCHEDULES: Mapping[str, Shape] = MappingProxyType(
    {
        "constant": Shape(constant),
        "cosine": Shape(cosine),
        "one_cycle": Shape(one_cycle, after_warmup=False, warms_up=False),
        "staircase": Shape(staircase, after_warmup=False),
    }
)


class LearningRate(Protocol):
    """The learning rate of a group at each step, and the steps in which it trains."""

    @property
    def first_step(self) -> int:
        """The step at which the group begins to train."""

    @property
    def last_step(self) -> int:
        """The step after the last one."""

    def __call__(self, step: tf.Tensor | int) -> tf.Tensor:
        """Returns the float32 learning rate at a step, counted from 0."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The learning rate of a group at each step of a run.

    Attributes:
      shape: how it changes; the name of an entry of `SCHEDULES`, or a shape.
      peak: the learning rate after the warm-up.
      first_step: the step at which the group begins to train; the rate is zero before it.
      last_step: the step after the run's last.
      warmup_steps: steps in which the rate rises linearly from peak / warmup_steps to its peak.
    """

    shape: str | Shape
    peak: float
    first_step: int
    last_step: int
    warmup_steps: int = 0

    def __call__(self, step: tf.Tensor | int) -> tf.Tensor:
        """Returns the float32 learning rate at a step, counted from 0."""
        import tensorflow as tf

        shape = SCHEDULES[self.shape] if isinstance(self.shape, str) else self.shape
        since = tf.cast(step, tf.float32) - float(self.first_step)
        begin = self.warmup_steps if shape.after_warmup else 0
        steps = max(1, self.last_step - self.first_step - begin)
        share = tf.clip_by_value((since - begin) / steps, 0.0, 1.0)
        rate = tf.constant(self.peak, tf.float32) * shape.factor(share)
        if self.warmup_steps and shape.warms_up:
            rate *= tf.minimum((since + 1.0) / self.warmup_steps, 1.0)
        return tf.where(since < 0, 0.0, rate)

    def __str__(self) -> str:
        shape = self.shape
        return f"{self.peak:g}, {shape if isinstance(shape, str) else shape.factor.__name__}"


@dataclasses.dataclass(frozen=True)
class InTurn:
    """One schedule until another begins."""

    first: Schedule
    then: Schedule

    @property
    def first_step(self) -> int:
        """The step at which the group begins to train."""
        return self.first.first_step

    @property
    def last_step(self) -> int:
        """The step after the run's last."""
        return self.then.last_step

    def __call__(self, step: tf.Tensor | int) -> tf.Tensor:
        """Returns the float32 learning rate at a step, counted from 0."""
        import tensorflow as tf

        begun = tf.cast(step, tf.int64) >= self.then.first_step
        return tf.where(begun, self.then(step), self.first(step))

    def __str__(self) -> str:
        if self.first.peak == self.then.peak:
            return str(self.first)
        return f"{self.first.peak:g} then {self.then}"


@dataclasses.dataclass(frozen=True)
class Rising:
    """A rate that rises geometrically over some steps, to find out what a model tolerates.

    Attributes:
      lowest: the rate at `first_step`.
      highest: the rate at the last of the steps.
      first_step: where it begins.
      steps: how many there are, at least 2.
    """

    lowest: float
    highest: float
    first_step: int
    steps: int

    @property
    def last_step(self) -> int:
        """The step after the last of them."""
        return self.first_step + self.steps

    def __call__(self, step: tf.Tensor | int) -> tf.Tensor:
        """Returns the float32 learning rate at a step, counted from 0."""
        import tensorflow as tf

        share = (tf.cast(step, tf.float32) - float(self.first_step)) / (self.steps - 1)
        return self.lowest * (self.highest / self.lowest) ** share


def _half_cosine(begin: float, end: float, share: tf.Tensor) -> tf.Tensor:
    """Goes from `begin` to `end` as a share goes from 0 to 1, slowly at both ends."""
    import tensorflow as tf

    return end + (begin - end) * 0.5 * (1.0 + tf.cos(math.pi * share))
