"""Loss and accuracy as weighted sums over photos, divided once at the end."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import tensorflow as tf


class Sums(NamedTuple):
    """Sums over photos, each a float32 scalar tensor; they add up over batches and devices."""

    loss: tf.Tensor
    correct: tf.Tensor
    weight: tf.Tensor


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Means over `photos` photos: loss in nats, accuracy in [0, 1]; NaN over none."""

    loss: float
    accuracy: float
    photos: float


def example_losses(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Returns the cross-entropy of each example in nats, computed from logits.

    Args:
      logits: float32 (batch, 1), the second class's logit, or (batch, classes).
      labels: integers (batch,).
    """
    if logits.shape[-1] == 1:
        targets = tf.cast(labels, logits.dtype)
        return tf.nn.sigmoid_cross_entropy_with_logits(targets, logits[:, 0])
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)


def mean_class_losses(logits: tf.Tensor) -> tf.Tensor:
    """Returns the mean of `example_losses` over all classes as labels, float32 (batch,).

    Args:
      logits: float32 (batch, 1), the second class's logit, or (batch, classes).
    """
    if logits.shape[-1] == 1:
        logits = tf.concat([tf.zeros_like(logits), logits], axis=-1)
    return tf.reduce_logsumexp(logits, axis=-1) - tf.reduce_mean(logits, axis=-1)


def predicted_labels(logits: tf.Tensor) -> tf.Tensor:
    """Returns the class of the largest probability, int32 (batch,)."""
    if logits.shape[-1] == 1:
        return tf.cast(logits[:, 0] > 0, tf.int32)
    return tf.argmax(logits, axis=-1, output_type=tf.int32)


def weighted_sums(
    logits: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor, losses: tf.Tensor | None = None
) -> Sums:
    """Sums losses, those of the examples by default, correct predictions and weights."""
    if losses is None:
        losses = example_losses(logits, labels)
    correct = tf.cast(tf.equal(predicted_labels(logits), tf.cast(labels, tf.int32)), tf.float32)
    return Sums(
        loss=tf.reduce_sum(weights * losses),
        correct=tf.reduce_sum(weights * correct),
        weight=tf.reduce_sum(weights),
    )


class SumsRead(NamedTuple):
    """`Sums` fetched from the device."""

    loss: float
    correct: float
    weight: float


def mean_metrics(sums: SumsRead) -> Metrics:
    """Divides the sums; means over nothing are NaN."""
    if not sums.weight:
        return Metrics(math.nan, math.nan, 0.0)
    return Metrics(sums.loss / sums.weight, sums.correct / sums.weight, sums.weight)


class Tally:
    """Adds up `Sums` on the device; a float64 variable, so that it can be saved with a run."""

    def __init__(self) -> None:
        self.variable = tf.Variable(tf.zeros(3, tf.float64), trainable=False, name="tally")

    def add(self, sums: Sums) -> None:
        """Adds a batch's sums; for inside a `tf.function`, outside of the replicas."""
        self.variable.assign_add(tf.cast(tf.stack(sums), tf.float64))

    def reset(self) -> None:
        """Starts again from zero."""
        self.variable.assign(tf.zeros(3, tf.float64))

    def read(self) -> SumsRead:
        """Fetches the sums from the device, waiting for the steps under way."""
        return SumsRead(*tf.convert_to_tensor(self.variable).numpy().tolist())
