"""A metric that is not a mean: the area under the ROC curve, computed in each epoch.

Flag: --task=examples/roc_auc.py:RocAuc
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from research.tasks.losses import class_logits
from research.tasks.task import Task

BINS = 1000  # of the probability; the error of the area is about 1 / BINS


class RocAuc(Task):
    """Classification of two classes that also reports `roc_auc`.

    The area is computed from histograms, which are summed over batches and devices.
    """

    def metrics(self, logits: tf.Tensor, batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        probability = tf.nn.softmax(class_logits(logits))[:, 1]
        in_bin = tf.one_hot(tf.cast(probability * (BINS - 1), tf.int32), BINS)
        positive = tf.cast(batch["label"], tf.float32)[:, tf.newaxis]
        histograms = {"positives": positive * in_bin, "negatives": (1 - positive) * in_bin}
        return {**super().metrics(logits, batch), **histograms}

    def figures(self, means: Mapping[str, np.ndarray]) -> Mapping[str, float]:
        means = dict(means)
        positives, negatives = means.pop("positives"), means.pop("negatives")
        below = np.cumsum(negatives) - negatives / 2  # a tie counts as one half
        area = (positives * below).sum() / (positives.sum() * negatives.sum())
        return {**super().figures(means), "roc_auc": float(area)}
