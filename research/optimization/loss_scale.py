"""One dynamic loss scale for all parameter groups, for training in float16."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

FIRST_SCALE = 2.0**15
STEPS_TO_DOUBLE = 2000


class LossScaleRead(NamedTuple):
    """The values of a loss scale, copied from the device."""

    scale: float
    skipped_steps: int


class LossScale:
    """Keeps float16 gradients within their range (Micikevicius et al. 2018, arXiv 1710.03740).

    The loss is multiplied by `scale` before the backward pass, and the gradients are divided by
    `scale` after it. If the gradients overflow on any device, all devices skip the step and the
    scale is halved. After 2,000 steps without overflow the scale is doubled. Create this object in
    a strategy scope.

    Args:
      active: False keeps the scale at 1, for formats with the range of float32.

    Attributes:
      scale: float32.
      good_steps: int64, number of steps since the scale last changed.
      skipped_steps: int64, number of skipped steps in the whole run.
    """

    def __init__(self, active: bool) -> None:
        self.active = active
        self.scale = tf.Variable(FIRST_SCALE if active else 1.0, trainable=False, name="loss_scale")
        self.good_steps = tf.Variable(0, trainable=False, dtype=tf.int64, name="good_steps")
        self.skipped_steps = tf.Variable(0, trainable=False, dtype=tf.int64, name="skipped_steps")

    def update(self, finite: tf.Tensor) -> None:
        """Updates the scale after a step, in a `tf.function` and outside the replicas.

        Args:
          finite: bool scalar, whether the gradients of the step were finite on all devices.
        """
        good = tf.where(finite, self.good_steps + 1, 0)
        double = good >= STEPS_TO_DOUBLE
        factor = tf.where(finite, tf.where(double, 2.0, 1.0), 0.5)
        self.scale.assign(self.scale * factor)
        self.good_steps.assign(tf.where(double, tf.zeros_like(good), good))
        self.skipped_steps.assign_add(tf.cast(~finite, tf.int64))

    def read(self) -> LossScaleRead:
        """Copies the scale and the number of skipped steps; waits for running steps."""
        return LossScaleRead(
            float(tf.convert_to_tensor(self.scale)), int(tf.convert_to_tensor(self.skipped_steps))
        )
