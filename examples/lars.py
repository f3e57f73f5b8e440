"""Your own optimizer: LARS, a learning rate per variable (You et al. 2017, arXiv 1708.03888).

Flag: --backbone_optimizer=examples/lars.py:Lars
"""

from __future__ import annotations

import keras
import tensorflow as tf

MOMENTUM, TRUST = 0.9, 0.001


class Lars(keras.optimizers.Optimizer):
    """SGD with momentum. Each gradient is scaled to a norm of TRUST times that of its variable."""

    def build(self, variables: list[keras.Variable]) -> None:
        if not self.built:
            super().build(variables)
            self.momentums = [
                self.add_variable_from_reference(variable, "momentum") for variable in variables
            ]

    def update_step(
        self, gradient: tf.Tensor, variable: keras.Variable, learning_rate: tf.Tensor
    ) -> None:
        norm, slope = tf.norm(tf.convert_to_tensor(variable)), tf.norm(gradient)
        trust = tf.where((norm > 0) & (slope > 0), TRUST * norm / slope, 1.0)
        momentum = self.momentums[self._get_variable_index(variable)]
        moved = MOMENTUM * tf.convert_to_tensor(momentum) + learning_rate * trust * gradient
        self.assign(momentum, moved)
        self.assign_sub(variable, moved)
