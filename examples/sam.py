"""Sharpness-aware minimization: the gradient at a nearby point of higher loss (arXiv 2010.01412).

Flag: --task=examples/sam.py:Sam
"""

from __future__ import annotations

from collections.abc import Sequence

import keras
import tensorflow as tf

from research.loop.steps import Network
from research.tasks.task import Gradients, Task

RADIUS = 0.05


class Sam(Task):
    """Moves the weights by RADIUS along the gradient, and returns the gradient at this point."""

    communicates = True  # all devices use the sum of their gradients for the move

    def gradients(
        self,
        network: Network,
        batch: dict[str, tf.Tensor],
        variables: Sequence[keras.Variable],
        scale: tf.Tensor | float,
        values: Sequence[tf.Tensor] | None = None,
    ) -> Gradients:
        first = super().gradients(network, batch, variables, scale)
        context = tf.distribute.get_replica_context()
        slopes = context.all_reduce(tf.distribute.ReduceOp.SUM, first.values)
        step = tf.math.divide_no_nan(RADIUS, tf.linalg.global_norm(slopes))
        above = [v.value + step * slope for v, slope in zip(variables, slopes, strict=True)]
        second = super().gradients(network, batch, variables, scale, above)
        return Gradients(second.values, first.sums)
