"""Other metrics: the recall of one class, and top-5 accuracy.

Flag: --task=examples/recall.py:Recall
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from research.tasks.losses import class_logits, predicted_labels
from research.tasks.task import Task

CLASS, MOST_PROBABLE = 1, 5


class Recall(Task):
    """Classification that also reports `recall` of the class with index 1, and `top_5`."""

    def metrics(self, logits: tf.Tensor, batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        labels = batch["label"]
        is_class = tf.cast(tf.equal(labels, CLASS), tf.float32)
        hit = tf.cast(tf.equal(predicted_labels(logits), CLASS), tf.float32)
        of_classes = class_logits(logits)
        top = tf.math.in_top_k(labels, of_classes, min(MOST_PROBABLE, of_classes.shape[1]))
        return {
            **super().metrics(logits, batch),
            "top_5": tf.cast(top, tf.float32),
            "of_class": is_class,
            "hits": is_class * hit,
        }

    def figures(self, means: Mapping[str, np.ndarray]) -> Mapping[str, float]:
        means = dict(means)
        hits, of_class = means.pop("hits"), means.pop("of_class")
        return {**super().figures(means), "recall": float(np.divide(hits, of_class))}
