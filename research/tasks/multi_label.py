"""`MultiLabel`: several labels per photo, or none. Each class is a yes-or-no question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf

from research.data.batches import Batch
from research.system.errors import UserError
from research.tasks.labels import check_label_vectors, label_vectors
from research.tasks.metrics import Means, Sums
from research.tasks.task import Task

# Bins of the histograms of logits. For a thousand classes, a step still sums only 130,000 numbers.
MOST_BINS, FEWEST_BINS, BINS_OF_ALL_CLASSES = 256, 32, 2**16
LARGEST_LOGIT = 10.0
MAX_NAMED_CLASSES = 50


class MultiLabel(Task):
    """Defines one logit per class, and the mean of the classes' binary cross-entropies as the loss.

    The labels of a photo are integers 0 and 1 of shape (classes,). A class index also counts: the
    photo then has this label alone.

    Args:
      label_smoothing: labels t become (1 - x) t + x / 2, as in Keras' `BinaryCrossentropy`.
      class_weights: a factor for the losses of the photos that have the label, by class, as
        `pos_weight` of PyTorch's `BCEWithLogitsLoss`; None for no factors.
    """

    supports = frozenset({"label_smoothing", "class_weights", "mixup", "cutmix"})

    def __init__(
        self, label_smoothing: float = 0.0, class_weights: Sequence[float] | None = None
    ) -> None:
        super().__init__(label_smoothing, class_weights)
        self._class_names: tuple[str, ...] = ()

    def make_head(
        self, feature_shape: tuple[int, ...], class_names: tuple[str, ...], seed: int
    ) -> tuple[keras.Layer, keras.Layer]:
        """Returns the pooling and a dense layer with one logit per class, also for two classes.

        Keeps the class names, for the names of figures per class.
        """
        self._class_names = class_names
        pooling, _ = super().make_head(feature_shape, class_names, seed)
        units = len(class_names)
        return pooling, keras.layers.Dense(
            units, kernel_initializer="zeros", dtype="float32", name="head"
        )

    def check_labels(self, labels: np.ndarray, class_names: Sequence[str]) -> None:
        """Raises `UserError` unless labels are class indices, or vectors of 0 and 1."""
        check_label_vectors(labels, class_names)

    def balanced_weights(self, labels: np.ndarray, classes: int) -> tuple[float, ...]:
        """Returns photos without the label / photos with it, by class.

        It is 1 if no photo has the label, or each: a weight of 0 would leave it out of the loss.
        """
        positives = label_vectors(labels, classes).sum(axis=0)
        ratios = (len(labels) - positives) / np.maximum(positives, 1)
        has_both = (positives > 0) & (positives < len(labels))
        return tuple(float(weight) for weight in np.where(has_both, ratios, 1.0))

    def losses(self, logits: tf.Tensor, batch: Batch) -> tf.Tensor:
        """Returns the mean binary cross-entropy over the classes, in nats, float32 (batch,).

        Args:
          logits: float32 (batch, classes).
          batch: `label`, integers (batch, classes) or class indices (batch,); if photos are mixed,
            `partner_label` like it, and the float32 `partner_share` (batch,).
        """
        targets = _targets(batch["label"], logits)
        if "partner_label" in batch:
            share = batch["partner_share"][:, tf.newaxis]
            targets = (1 - share) * targets + share * _targets(batch["partner_label"], logits)
        targets = (1 - self.label_smoothing) * targets + self.label_smoothing / 2
        weights = 1.0 if self.class_weights is None else tf.constant(self.class_weights, tf.float32)
        losses = tf.nn.weighted_cross_entropy_with_logits(targets, logits, weights)
        return tf.reduce_mean(losses, axis=1)

    def metrics(self, logits: tf.Tensor, batch: Batch) -> dict[str, tf.Tensor]:
        """Returns values of each example by name, float32 (batch,) or (batch, classes).

        They are the share of classes that are right at a probability of 0.5, whether all are right,
        and the binary cross-entropies of the classes.
        """
        targets = _targets(batch["label"], logits)
        right = tf.cast(tf.equal(logits > 0, targets > 0), tf.float32)
        return {
            "exact_match": tf.reduce_min(right, axis=1),
            "label_accuracy": tf.reduce_mean(right, axis=1),
            "class_losses": tf.nn.sigmoid_cross_entropy_with_logits(targets, logits),
        }

    def sums(self, logits: tf.Tensor, batch: Batch) -> Sums:
        """Adds histograms of the logits of photos with and without each label.

        As values of each example, they would be (batch, classes, bins).
        """
        classes = logits.shape[-1]
        bins = _bins(classes)
        width = 2 * LARGEST_LOGIT / bins
        places = tf.cast(tf.floor((logits + LARGEST_LOGIT) / width), tf.int32)
        places = tf.clip_by_value(places, 0, bins - 1) + bins * tf.range(classes)
        targets = _targets(batch["label"], logits)
        weights = batch["weight"][:, tf.newaxis]
        counted = {"positives": weights * targets, "negatives": weights * (1 - targets)}
        histograms = {
            name: tf.reshape(
                tf.math.unsorted_segment_sum(values, places, bins * classes), (classes, bins)
            )
            for name, values in counted.items()
        }
        return {**super().sums(logits, batch), **histograms}

    def figures(self, means: Means) -> Mapping[str, float]:
        """Returns `average_precision`, the mean over classes, and the means of `metrics`.

        The area under the precision-recall curve is computed from histograms, as if logits were
        rounded to multiples of about 0.1. Classes that no photo has are left out of its mean. Up to
        50 classes, the cross-entropy and the average precision of each class follow, as
        `cross_entropy/NAME` and `average_precision/NAME`.
        """
        means = dict(means)
        areas = average_precisions(means.pop("positives"), means.pop("negatives"))
        losses = means.pop("class_losses")
        known = areas[~np.isnan(areas)]
        figures = {
            "average_precision": float(known.mean()) if len(known) else float("nan"),
            **super().figures(means),
            "cross_entropy": float(losses.mean()),
        }
        if len(self._class_names) <= MAX_NAMED_CLASSES:
            for title, values in (("cross_entropy", losses), ("average_precision", areas)):
                for name, value in zip(self._class_names, values, strict=False):
                    figures[f"{title}/{name}"] = float(value)
        return figures


def has_several_labels(task: type[Task]) -> bool:
    """Returns whether photos can have several labels, or none, in a task."""
    return issubclass(task, MultiLabel)


def average_precisions(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """Returns the average precision of each class, float64 (classes,), from histograms of scores.

    It is the mean of the precision at the scores of the photos with the label, where the scores in
    one bin are equal: `sklearn.metrics.average_precision_score` of the bins.

    Args:
      positives: weight of the photos with the label, (classes, bins), from the lowest score on.
      negatives: weight of the photos without the label, like `positives`.

    Returns:
      Values in [0, 1]; NaN for a class without positives.
    """
    true, false = (np.cumsum(one[:, ::-1], axis=1) for one in (positives, negatives))
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.nan_to_num(true / (true + false))
        return (positives[:, ::-1] * precision).sum(axis=1) / true[:, -1]


def _targets(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Returns the labels as float32 (batch, classes)."""
    classes = logits.shape[-1]
    if classes == 1:
        raise UserError(
            "the head of a multi_label task returns one logit; expected one logit per class, also "
            "for two classes"
        )
    if labels.shape.rank == 1:
        return tf.one_hot(labels, classes)
    return tf.cast(labels, tf.float32)


def _bins(classes: int) -> int:
    return min(MOST_BINS, max(FEWEST_BINS, BINS_OF_ALL_CLASSES // classes))
