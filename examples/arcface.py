"""ArcFace: cosine logits, and an angular margin for the true class (arXiv 1801.07698).

Flag: --task=examples/arcface.py:ArcFace
"""

from __future__ import annotations

import keras
import tensorflow as tf

from research.tasks.losses import cross_entropy
from research.tasks.task import Task

SCALE, MARGIN = 16.0, 0.3


class Cosine(keras.layers.Dense):
    """SCALE times the cosine of the angle between the features and the weights of each class."""

    def call(self, features: tf.Tensor, training: bool = False) -> tf.Tensor:
        directions = tf.math.l2_normalize(tf.convert_to_tensor(self.kernel), axis=0)
        return SCALE * tf.math.l2_normalize(features, axis=1) @ directions


class ArcFace(Task):
    """Classification with MARGIN added to the angle of the true class in the loss."""

    def make_head(
        self, feature_shape: tuple[int, ...], class_names: tuple[str, ...], seed: int
    ) -> tuple[keras.Layer, keras.Layer]:
        pooling, _ = super().make_head(feature_shape, class_names, seed)
        glorot = keras.initializers.GlorotUniform(seed=seed)
        head = Cosine(len(class_names), use_bias=False, kernel_initializer=glorot, dtype="float32")
        return pooling, head

    def losses(self, logits: tf.Tensor, batch: dict[str, tf.Tensor]) -> tf.Tensor:
        own = tf.one_hot(batch["label"], logits.shape[1])
        angle = tf.acos(tf.clip_by_value(logits / SCALE, -1 + 1e-6, 1 - 1e-6)) + MARGIN * own
        return cross_entropy(SCALE * tf.cos(angle), batch["label"])
