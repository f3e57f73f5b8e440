"""One dynamic loss scale for all parameter groups, for training in float16."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

FIRST_SCALE = 2.0**15
STEPS_TO_DOUBLE = 2000


class LossScaleRead(NamedTuple):
    """A loss scale fetched from the device."""

    scale: float
    skipped_steps: int


class LossScale:
    """Keeps float16 gradients within their range (Micikevicius et al. 2018, arXiv 1710.03740).

    The loss is multiplied by `scale` before the backward pass, and gradients are divided by it
    after. A step whose gradients overflowed on any device is skipped on all of them and halves the
    scale; it doubles after 2,000 steps without one. Built under a strategy scope.

    Args:
      active: False keeps the scale at 1 for good, for formats with the range of float32.

    Attributes:
      scale: float32.
      good_steps: int64, steps since the scale last changed.
      skipped_steps: int64, over the whole run.
    """

    def __init__(self, active: bool) -> None:
        self.active = active
        self.scale = tf.Variable(FIRST_SCALE if active else 1.0, trainable=False, name="loss_scale")
        self.good_steps = tf.Variable(0, trainable=False, dtype=tf.int64, name="good_steps")
        self.skipped_steps = tf.Variable(0, trainable=False, dtype=tf.int64, name="skipped_steps")

    def update(self, finite: tf.Tensor) -> None:
        """Takes note of a step; for inside a `tf.function`, outside of the replicas.

        Args:
          finite: bool scalar, whether the step's gradients were finite on all devices.
        """
        good = tf.where(finite, self.good_steps + 1, 0)
        double = good >= STEPS_TO_DOUBLE
        factor = tf.where(finite, tf.where(double, 2.0, 1.0), 0.5)
        self.scale.assign(self.scale * factor)
        self.good_steps.assign(tf.where(double, tf.zeros_like(good), good))
        self.skipped_steps.assign_add(tf.cast(~finite, tf.int64))

    def read(self) -> LossScaleRead:
        """Fetches the scale and the number of steps skipped, waiting for the steps under way."""
        return LossScaleRead(
            float(tf.convert_to_tensor(self.scale)), int(tf.convert_to_tensor(self.skipped_steps))
        )
