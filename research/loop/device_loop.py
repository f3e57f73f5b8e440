"""Runs several training steps in one call, in a loop inside the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import tensorflow as tf

from research.data.batches import Batch

Scalars = dict[str, tf.Tensor]


def compile_loop(
    train_step: Callable[[Batch], Scalars], strategy: tf.distribute.Strategy
) -> tf.types.experimental.GenericFunction:
    """Returns a function that runs several steps without returning to Python.

    Args:
      train_step: runs one step.
      strategy: the strategy that `train_step` uses.

    Returns:
      A function of an iterator of batches and the number of steps, an int32 scalar. It returns the
      scalars of the last step, and the seconds spent waiting for input, a float64 scalar.
    """

    def step(batches: Iterator[Batch]) -> tuple[Scalars, tf.Tensor]:
        begin = tf.timestamp()
        with tf.control_dependencies([begin]):
            batch = next(batches)
        with tf.control_dependencies(strategy.experimental_local_results(batch["weight"])):
            waited = tf.timestamp() - begin
        return train_step(batch), waited

    @tf.function(autograph=False)
    def loop(batches: Iterator[Batch], count: tf.Tensor) -> tuple[Scalars, tf.Tensor]:
        def body(
            number: tf.Tensor, _: Scalars, waited: tf.Tensor
        ) -> tuple[tf.Tensor, Scalars, tf.Tensor]:
            scalars, seconds = step(batches)
            return number + 1, scalars, waited + seconds

        scalars, waited = step(batches)
        _, scalars, waited = tf.while_loop(
            lambda number, *_: number < count,
            body,
            (tf.constant(1), scalars, waited),
            parallel_iterations=1,
        )
        return scalars, waited

    return loop
