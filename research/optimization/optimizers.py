"""The table of optimizers. To add an optimizer, add one entry; the flags and the builder read it.

This module must not import TensorFlow or Keras before an optimizer is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

ReadLearningRate = Callable[[], "tf.Tensor"]
BuildOptimizer = Callable[..., "keras.optimizers.Optimizer"]


def _keras_optimizer(name: str) -> BuildOptimizer:
    def build(learning_rate: ReadLearningRate) -> keras.optimizers.Optimizer:
        import keras

        return getattr(keras.optimizers, name)(learning_rate=learning_rate)

    return build


def sgd(learning_rate: ReadLearningRate, momentum: float) -> keras.optimizers.Optimizer:
    """Builds stochastic gradient descent with the momentum of `--momentum`."""
    import keras

    return keras.optimizers.SGD(learning_rate, momentum=momentum)


# Every function takes `learning_rate`, a function without arguments that the optimizer calls in
# each step. All other parameters have the names of `TrainConfig` settings and get their values.
OPTIMIZERS: Mapping[str, BuildOptimizer] = {
    "sgd": sgd,
    "rmsprop": _keras_optimizer("RMSprop"),
    "adam": _keras_optimizer("Adam"),
    "adamw": _keras_optimizer("AdamW"),
    "lion": _keras_optimizer("Lion"),
}
