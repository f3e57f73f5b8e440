"""The table of optimizers, which the flags and the builder read. One entry adds one.

This module must stay free of TensorFlow and Keras until an optimizer is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

LearningRate = Callable[[], "tf.Tensor"]
BuildOptimizer = Callable[..., "keras.optimizers.Optimizer"]


def _keras_optimizer(name: str) -> BuildOptimizer:
    def build(learning_rate: LearningRate) -> keras.optimizers.Optimizer:
        import keras

        return getattr(keras.optimizers, name)(learning_rate=learning_rate)

    return build


def sgd(learning_rate: LearningRate, momentum: float) -> keras.optimizers.Optimizer:
    """Builds stochastic gradient descent. `momentum` comes from --momentum."""
    import keras

    return keras.optimizers.SGD(learning_rate, momentum=momentum)


# Each is called with `learning_rate`, a function without arguments, which the optimizer asks in
# each step; and with the settings of `TrainConfig` that its other parameters are named after.
OPTIMIZERS: Mapping[str, BuildOptimizer] = MappingProxyType(
    {
        "sgd": sgd,
        "rmsprop": _keras_optimizer("RMSprop"),
        "adam": _keras_optimizer("Adam"),
        "adamw": _keras_optimizer("AdamW"),
        "lion": _keras_optimizer("Lion"),
    }
)
