"""An exponential moving average of the trained weights, to evaluate and to keep."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import keras
import tensorflow as tf


class WeightAverages:
    """Follows variables as they are trained (Polyak and Juditsky 1992; arXiv 1803.05407 for nets).

    Keras's optimizers can do that too, but not exchange weights and averages, and theirs would be
    in the optimizers, which evaluation does without. Built under a strategy scope.

    Args:
      variables: what to follow; all start from their values now.
      decay: the share of itself that an average keeps in a step. Less of it in a variable's first
        ones, at most (1 + step) / (10 + step), so that its initial value does not linger.
    """

    def __init__(self, variables: Sequence[keras.Variable], decay: float) -> None:
        self._followed = {id(variable): variable for variable in variables}
        self._decay = decay
        self._strategy = tf.distribute.get_strategy()
        self._averages = {
            id(variable): tf.Variable(variable.value, trainable=False) for variable in variables
        }

    @property
    def variables(self) -> list[tf.Variable]:
        """The averages, in the order of the variables."""
        return list(self._averages.values())

    def update(self, trained: Sequence[keras.Variable], step: tf.Tensor) -> None:
        """Moves the averages of some variables; for inside a `tf.function`, outside of replicas.

        Args:
          trained: those that a step has just changed.
          step: updates made to them before it.
        """
        made = tf.cast(step, tf.float32)
        rest = 1.0 - tf.minimum(self._decay, (1.0 + made) / (10.0 + made))

        def move(average: tf.Variable, value: tf.Tensor) -> None:
            average.assign_add(rest * (value - average))

        for variable in trained:
            self._on_each_device(self._averages[id(variable)], move, variable.value)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the averages in the place of the weights for a while."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def take_place(self) -> None:
        """Puts the averages in the place of the weights for good, until others are restored."""
        self._exchange()

    @tf.function(autograph=False)
    def _exchange(self) -> None:
        def exchange(average: tf.Variable, weight: tf.Variable) -> None:
            kept = tf.identity(weight)
            weight.assign(average)
            average.assign(kept)

        for key, variable in self._followed.items():
            self._on_each_device(self._averages[key], exchange, variable.value)

    def _on_each_device(
        self,
        variable: tf.Variable,
        change: Callable[[tf.Variable, tf.Variable], None],
        other: tf.Variable,
    ) -> None:
        """Changes each device's copy of a variable, given its copy of another."""
        self._strategy.extended.update(variable, change, args=(other,))
