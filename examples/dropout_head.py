"""A head with a hidden layer and Dropout (Srivastava et al. 2014, JMLR 15).

Flag: --task=examples/dropout_head.py:DropoutHead
"""

from __future__ import annotations

import keras

from research.tasks.task import Task

UNITS, DROPOUT = 64, 0.5


class DropoutHead(Task):
    """Classification with two dense layers and Dropout before each of them."""

    def make_head(
        self, feature_shape: tuple[int, ...], class_names: tuple[str, ...], seed: int
    ) -> tuple[keras.Layer, keras.Layer]:
        pooling, logits = super().make_head(feature_shape, class_names, seed)
        glorot = keras.initializers.GlorotUniform(seed=seed + 1)
        layers = [
            keras.layers.Dropout(DROPOUT, seed=seed, dtype="float32"),
            keras.layers.Dense(
                UNITS, "relu", kernel_initializer=glorot, dtype="float32", name="hidden"
            ),
            keras.layers.Dropout(DROPOUT, seed=seed + 1, dtype="float32"),
            logits,
        ]
        return pooling, keras.Sequential(layers, name="head")
