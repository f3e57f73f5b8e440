"""Exponential moving averages of the trained weights, for evaluation and for saving."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import keras
import tensorflow as tf


class WeightAverages:
    """Averages of variables over the training steps.

    References: Polyak and Juditsky 1992; for neural networks, arXiv 1803.05407. Keras's optimizers
    can average weights too, but they cannot swap weights and averages, and evaluation, which builds
    no optimizers, could not read their averages. Create this object in a strategy scope.

    Args:
      variables: the variables to average. Each average starts at the current value.
      decay: the share of the old average that a step keeps. In the first steps of a variable the
        share is at most (1 + step) / (10 + step), so that the initial value soon has no effect.
    """

    def __init__(self, variables: Sequence[keras.Variable], decay: float) -> None:
        self._decay = decay
        self._update_copies = tf.distribute.get_strategy().extended.update
        self._pairs = {
            id(variable): (variable, tf.Variable(variable.value, trainable=False))
            for variable in variables
        }

    @property
    def variables(self) -> list[tf.Variable]:
        """The averages, in the order of the variables."""
        return [average for _, average in self._pairs.values()]

    def update(self, trained: Sequence[keras.Variable], step: tf.Tensor) -> None:
        """Updates the averages of some variables, in a `tf.function` and outside the replicas.

        Args:
          trained: the variables that a step has just changed.
          step: number of earlier updates of these variables.
        """
        updates = tf.cast(step, tf.float32)
        rate = 1.0 - tf.minimum(self._decay, (1.0 + updates) / (10.0 + updates))

        def move(average: tf.Variable, value: tf.Tensor) -> None:
            average.assign_add(rate * (value - average))

        for variable in trained:
            _, average = self._pairs[id(variable)]
            self._update_copies(average, move, args=(variable.value,))

    @tf.function(autograph=False)
    def swap(self) -> None:
        """Exchanges the values of the weights and the averages."""

        def exchange(average: tf.Variable, weight: tf.Variable) -> None:
            kept = tf.identity(weight)
            weight.assign(average)
            average.assign(kept)

        for variable, average in self._pairs.values():
            self._update_copies(average, exchange, args=(variable.value,))

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Gives the weights the values of the averages within a `with` block."""
        self.swap()
        try:
            yield
        finally:
            self.swap()
