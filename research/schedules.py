"""Learning rates as pure functions of the step."""

from __future__ import annotations

import dataclasses
import math

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The learning rate of a group at each step of a run.

    Attributes:
      shape: `constant`, or `cosine`, which falls to zero at the end (Loshchilov and Hutter 2017,
        arXiv 1608.03983).
      peak: the learning rate after the warm-up.
      first_step: the step at which the group begins to train; zero before it.
      last_step: the step after the run's last.
      warmup_steps: steps in which the rate rises linearly from peak / warmup_steps to its peak.
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
            falling = max(1, self.last_step - self.first_step - self.warmup_steps)
            progress = tf.clip_by_value((since - self.warmup_steps) / falling, 0.0, 1.0)
            rate *= 0.5 * (1.0 + tf.cos(math.pi * progress))
        if self.warmup_steps:
            rate *= tf.minimum((since + 1.0) / self.warmup_steps, 1.0)
        return tf.where(since < 0, 0.0, rate)
