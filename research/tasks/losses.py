"""Losses and predictions of single-label classification, from logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tensorflow as tf


def cross_entropy(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Returns the cross-entropy of each example in nats, float32 (batch,).

    Args:
      logits: float32 (batch, 1), the logit of the second class, or (batch, classes).
      labels: integers (batch,).
    """
    if logits.shape[-1] == 1:
        targets = tf.cast(labels, logits.dtype)
        return tf.nn.sigmoid_cross_entropy_with_logits(targets, logits[:, 0])
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)


def label_losses(
    logits: tf.Tensor,
    batch: Mapping[str, tf.Tensor],
    smoothing: float,
    class_weights: Sequence[float] | None,
) -> tf.Tensor:
    """Returns the cross-entropy of each example with smoothed and mixed labels, float32 (batch,).

    Args:
      logits: see `cross_entropy`.
      batch: `label`; and, if photos are mixed, `partner_label` and `partner_share`.
      smoothing: the share of each label that is distributed over all classes, in [0, 1).
      class_weights: a factor for the losses of each class, by label; None for no factors.
    """

    def losses_for(labels: tf.Tensor) -> tf.Tensor:
        losses = cross_entropy(logits, labels)
        if smoothing:
            losses = (1 - smoothing) * losses + smoothing * mean_class_losses(logits)
        if class_weights is not None:
            losses *= tf.gather(tf.constant(class_weights, tf.float32), labels)
        return losses

    losses = losses_for(batch["label"])
    if "partner_label" in batch:
        share = batch["partner_share"]
        losses = (1 - share) * losses + share * losses_for(batch["partner_label"])
    return losses


def mean_class_losses(logits: tf.Tensor) -> tf.Tensor:
    """Returns the mean of `cross_entropy` over all possible labels, float32 (batch,).

    Args:
      logits: float32 (batch, 1), the logit of the second class, or (batch, classes).
    """
    logits = class_logits(logits)
    return tf.reduce_logsumexp(logits, axis=-1) - tf.reduce_mean(logits, axis=-1)


def class_logits(logits: tf.Tensor) -> tf.Tensor:
    """Returns one logit per class, (batch, classes). A single logit z becomes (0, z)."""
    if logits.shape[-1] == 1:
        return tf.concat([tf.zeros_like(logits), logits], axis=-1)
    return logits


def predicted_labels(logits: tf.Tensor) -> tf.Tensor:
    """Returns the class with the largest probability, int32 (batch,)."""
    if logits.shape[-1] == 1:
        return tf.cast(logits[:, 0] > 0, tf.int32)
    return tf.argmax(logits, axis=-1, output_type=tf.int32)


def balanced_weights(photos_per_class: Sequence[int]) -> tuple[float, ...]:
    """Returns class weights that give all classes the same total weight.

    The mean weight of a photo is 1, as with scikit-learn's `class_weight="balanced"`: the weight is
    photos / (classes * photos of the class).

    Args:
      photos_per_class: number of photos by label. Classes without photos get the weight 0.
    """
    present = [count for count in photos_per_class if count]
    mean = sum(present) / len(present)
    return tuple(mean / count if count else 0.0 for count in photos_per_class)
