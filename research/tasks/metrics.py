"""Metrics as weighted sums over photos. The sums are divided by the total weight at the end."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np
import tensorflow as tf

# Sums by name: `weight` is the sum of the weights, all others are weighted sums of values.
Sums = dict[str, tf.Tensor]
SumsRead = dict[str, np.ndarray]
Means = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Metrics over some photos; NaN if there are no photos.

    Attributes:
      values: `loss` in nats, and the task's figures, by name.
      photos: the sum of the photos' weights.
    """

    values: Mapping[str, float]
    photos: float

    @property
    def loss(self) -> float:
        """The mean of the task's losses."""
        return self.values["loss"]

    def __getitem__(self, name: str) -> float:
        return self.values[name]


def weighted_sums(values: Mapping[str, tf.Tensor], weights: tf.Tensor) -> Sums:
    """Computes weighted sums over a batch.

    Args:
      values: values of the examples by name, each float32 (batch, ...).
      weights: weights of the examples, float32 (batch,).

    Returns:
      The weighted sum of each, float32 with the shape of one example's value; and `weight`.
    """
    sums = {}
    for name, value in values.items():
        own = weights
        if len(value.shape) > 1:
            own = tf.reshape(weights, (-1, *(1,) * (len(value.shape) - 1)))
        sums[name] = tf.reduce_sum(own * value, axis=0)
    return {**sums, "weight": tf.reduce_sum(weights)}


def mean_metrics(sums: SumsRead, figures: Callable[[Means], Mapping[str, float]]) -> Metrics:
    """Divides sums by the total weight; the means are NaN if the weight is zero.

    Args:
      sums: the sums of the losses as `loss`, of the task's metrics by name, and `weight`.
      figures: computes figures from the means of the metrics; see `Task.figures`.
    """
    weight = float(sums["weight"])
    means = {
        name: value / weight if weight else np.full(value.shape, math.nan)
        for name, value in sums.items()
        if name != "weight"
    }
    loss = float(means.pop("loss"))
    with np.errstate(invalid="ignore", divide="ignore"):
        return Metrics({"loss": loss, **figures(means)}, weight)


class Tally:
    """Adds up `Sums` on the device, in one float64 variable that is saved with a run.

    Args:
      shapes: the shapes of the sums, by name.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = dict(shapes)
        self.variable = tf.Variable(self._zeros(), trainable=False, name="tally")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sums."""
        return tuple(self._shapes)

    def empty_copy(self) -> Tally:
        """Returns another tally of the same sums, at zero."""
        return Tally(self._shapes)

    def _zeros(self) -> tf.Tensor:
        return tf.zeros(sum(map(math.prod, self._shapes.values())), tf.float64)

    def add(self, sums: Sums) -> None:
        """Adds the sums of a batch, in a `tf.function` and outside the replicas."""
        flat = tf.concat([tf.reshape(sums[name], [-1]) for name in self._shapes], axis=0)
        self.variable.assign_add(tf.cast(flat, tf.float64))

    def reset(self) -> None:
        """Sets all sums to zero."""
        self.variable.assign(self._zeros())

    def read(self) -> SumsRead:
        """Fetches the sums from the device, and waits for running steps."""
        rest = tf.convert_to_tensor(self.variable).numpy()
        sums = {}
        for name, shape in self._shapes.items():
            size = math.prod(shape)
            sums[name], rest = rest[:size].reshape(shape), rest[size:]
        return sums
