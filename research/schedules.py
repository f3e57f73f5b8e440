"""Learning rates as pure functions of the step."""

from __future__ import annotations

import dataclasses
import math

import tensorflow as tf

# Of a cycle: the share of it that rises, and what the peak is divided by at its begin and end.
RISING_SHARE, FIRST_DIVISOR, LAST_DIVISOR = 0.25, 25.0, 1e5
STAIRS = (0.3, 0.6, 0.9)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The learning rate of a group at each step of a run.

    Attributes:
      shape: `constant`; `cosine`, which falls to zero at the end (Loshchilov and Hutter 2017, arXiv
        1608.03983); `one_cycle`, which rises from a 25th of its peak in the first quarter, and
        falls to nearly nothing (Smith and Topin 2018, arXiv 1708.07120, in fastai's form, without
        its cycle of momentum); `staircase`, a tenth after 30, 60 and 90 % of the steps (Kolesnikov
        et al. 2020, arXiv 1912.11370).
      peak: the learning rate after the warm-up.
      first_step: the step at which the group begins to train; zero before it.
      last_step: the step after the run's last.
      warmup_steps: steps in which the rate rises linearly from peak / warmup_steps to its peak;
        nothing to `one_cycle`.
    """

    shape: str
    peak: float
    first_step: int
    last_step: int
    warmup_steps: int = 0

    def __call__(self, step: tf.Tensor | int) -> tf.Tensor:
        """Returns the float32 learning rate at a step, counted from 0."""
        since = tf.cast(step, tf.float32) - float(self.first_step)
        rate = tf.constant(self.peak, tf.float32)
        if self.shape == "cosine":
            rate *= _half_cosine(1.0, 0.0, self._progress(since, self.warmup_steps))
        elif self.shape == "one_cycle":
            share = self._progress(since, 0)
            rising = _half_cosine(1 / FIRST_DIVISOR, 1.0, share / RISING_SHARE)
            falling = _half_cosine(
                1.0, 1 / LAST_DIVISOR, (share - RISING_SHARE) / (1 - RISING_SHARE)
            )
            rate *= tf.where(share < RISING_SHARE, rising, falling)
        elif self.shape == "staircase":
            share = self._progress(since, 0)
            rate *= 0.1 ** tf.add_n([tf.cast(share >= stair, tf.float32) for stair in STAIRS])
        if self.warmup_steps and self.shape != "one_cycle":
            rate *= tf.minimum((since + 1.0) / self.warmup_steps, 1.0)
        return tf.where(since < 0, 0.0, rate)

    def _progress(self, since: tf.Tensor, begin: int) -> tf.Tensor:
        """Returns how much of the steps after the first `begin` is over, in [0, 1]."""
        steps = max(1, self.last_step - self.first_step - begin)
        return tf.clip_by_value((since - begin) / steps, 0.0, 1.0)

    def __str__(self) -> str:
        return f"{self.peak:g}, {self.shape}"


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
        begun = tf.cast(step, tf.int64) >= self.then.first_step
        return tf.where(begun, self.then(step), self.first(step))

    def __str__(self) -> str:
        if self.first.peak == self.then.peak:
            return str(self.first)
        return f"{self.first.peak:g} then {self.then}"


@dataclasses.dataclass(frozen=True)
class Rising:
    """A rate that rises geometrically over some steps, to see what a model bears.

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
        share = (tf.cast(step, tf.float32) - float(self.first_step)) / (self.steps - 1)
        return self.lowest * (self.highest / self.lowest) ** share


def _half_cosine(begin: float, end: float, share: tf.Tensor) -> tf.Tensor:
    """Goes from `begin` to `end` as a share goes from 0 to 1, slowly at both ends."""
    return end + (begin - end) * 0.5 * (1.0 + tf.cos(math.pi * share))
