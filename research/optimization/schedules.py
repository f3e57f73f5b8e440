"""Learning rates as pure functions of the step. The flags read the table `SCHEDULES`.

This module must not import TensorFlow before a learning rate is computed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import tensorflow as tf

# One cycle: the share of the steps in which the rate rises, and the divisors of the peak that give
# the first and the last rate.
RISING_SHARE, FIRST_DIVISOR, LAST_DIVISOR = 0.25, 25.0, 1e5
STAIRS = (0.3, 0.6, 0.9)


class Shape(NamedTuple):
    """The curve of a learning rate over time.

    Attributes:
      factor: maps the completed share of the steps, a float32 scalar in [0, 1], to a factor of the
        peak.
      after_warmup: True if the share counts only the steps after the warm-up.
      warms_up: True if the rate rises linearly in the warm-up; False if the curve itself rises.
      depends_on_length: whether the rate at a step depends on the number of steps of the run.
    """

    factor: Callable[[tf.Tensor], tf.Tensor | float]
    after_warmup: bool = True
    warms_up: bool = True
    depends_on_length: bool = True


def constant(share: tf.Tensor) -> float:
    """Stays at the peak."""
    return 1.0


def cosine(share: tf.Tensor) -> tf.Tensor:
    """Falls to zero along half a cosine (Loshchilov and Hutter 2017, arXiv 1608.03983)."""
    return _half_cosine(1.0, 0.0, share)


def one_cycle(share: tf.Tensor) -> tf.Tensor:
    """Rises from 1/25 of the peak to the peak in the first quarter, then falls to 1e-5 of the peak.

    This is fastai's form of Smith and Topin 2018, arXiv 1708.07120, with constant momentum.
    """
    import tensorflow as tf

    rising = _half_cosine(1 / FIRST_DIVISOR, 1.0, share / RISING_SHARE)
    falling = _half_cosine(1.0, 1 / LAST_DIVISOR, (share - RISING_SHARE) / (1 - RISING_SHARE))
    return tf.where(share < RISING_SHARE, rising, falling)


def staircase(share: tf.Tensor) -> tf.Tensor:
    """Falls to a tenth at 30, 60 and 90 % of steps (Kolesnikov et al. 2020, arXiv 1912.11370)."""
    import tensorflow as tf

    return 0.1 ** tf.add_n([tf.cast(share >= stair, tf.float32) for stair in STAIRS])


# To add a schedule, add one entry. A user's function, given as FILE.py:NAME, becomes a `Shape` too.
SCHEDULES: Mapping[str, Shape] = {
    "constant": Shape(constant, depends_on_length=False),
    "cosine": Shape(cosine),
    "one_cycle": Shape(one_cycle, after_warmup=False, warms_up=False),
    "staircase": Shape(staircase, after_warmup=False),
}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The learning rate of a group at each step of a run.

    Attributes:
      shape: the curve: a name in `SCHEDULES`, or a `Shape`.
      peak: the learning rate after the warm-up.
      first_step: the step at which the group starts to train. Before it the rate is zero.
      last_step: the step after the last step of the run.
      warmup_steps: number of steps in which the rate rises linearly from peak / warmup_steps to
        the peak.
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
        elapsed = tf.cast(step, tf.float32) - float(self.first_step)
        begin = self.warmup_steps if shape.after_warmup else 0
        steps = max(1, self.last_step - self.first_step - begin)
        share = tf.clip_by_value((elapsed - begin) / steps, 0.0, 1.0)
        rate = tf.constant(self.peak, tf.float32) * tf.cast(shape.factor(share), tf.float32)
        if self.warmup_steps and shape.warms_up:
            rate *= tf.minimum((elapsed + 1.0) / self.warmup_steps, 1.0)
        return tf.where(elapsed < 0, 0.0, rate)

    def __str__(self) -> str:
        shape = self.shape
        if isinstance(shape, str):
            return f"{self.peak:g}, {shape}"
        factor = shape.factor  # a function, or an object that can be called
        return f"{self.peak:g}, {getattr(factor, '__name__', type(factor).__name__)}"


@dataclasses.dataclass(frozen=True)
class SequentialSchedule:
    """Two schedules. The second replaces the first at the first step of the second."""

    first: Schedule
    then: Schedule

    @property
    def first_step(self) -> int:
        """The step at which the group starts to train."""
        return self.first.first_step

    @property
    def last_step(self) -> int:
        """The step after the last step of the run."""
        return self.then.last_step

    def __call__(self, step: tf.Tensor | int) -> tf.Tensor:
        """Returns the float32 learning rate at a step, counted from 0."""
        import tensorflow as tf

        is_second = tf.cast(step, tf.int64) >= self.then.first_step
        return tf.where(is_second, self.then(step), self.first(step))

    def __str__(self) -> str:
        if self.first.peak == self.then.peak:
            return str(self.first)
        return f"{self.first.peak:g} then {self.then}"


@dataclasses.dataclass(frozen=True)
class Rising:
    """A learning rate that rises geometrically, for the learning rate finder.

    Attributes:
      lowest: the rate at the first step.
      highest: the rate at the last step.
      first_step: the first step.
      last_step: the step after the last step, at least `first_step + 2`.
    """

    lowest: float
    highest: float
    first_step: int
    last_step: int

    def __call__(self, step: tf.Tensor | int) -> tf.Tensor:
        """Returns the float32 learning rate at a step, counted from 0."""
        import tensorflow as tf

        intervals = self.last_step - self.first_step - 1
        share = (tf.cast(step, tf.float32) - float(self.first_step)) / intervals
        return self.lowest * (self.highest / self.lowest) ** share


LearningRate = Schedule | SequentialSchedule | Rising


def _half_cosine(begin: float, end: float, share: tf.Tensor) -> tf.Tensor:
    """Changes smoothly from `begin` to `end` as the share grows from 0 to 1."""
    import tensorflow as tf

    return end + (begin - end) * 0.5 * (1.0 + tf.cos(math.pi * share))
