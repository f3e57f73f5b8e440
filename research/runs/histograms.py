"""TensorBoard histograms of trained weights and their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import tensorflow as tf

from research.runs.event_files import EventFiles


class Histograms:
    """Writes histograms from inside training steps.

    Args:
      files: the run's event files.
      every: number of steps between two histograms.
    """

    def __init__(self, files: EventFiles, every: int) -> None:
        self._files = files
        self._writer = files.writer("train", ".histograms")
        self._every = every

    def write(
        self, step: tf.Tensor, variables: Sequence[keras.Variable], gradients: Sequence[tf.Tensor]
    ) -> None:
        """Writes histograms if they are due at this step. Call it in a `tf.function`.

        Args:
          step: number of updates made, including this step's.
          variables: the variables just updated.
          gradients: the gradient of each variable.
        """
        is_due = tf.equal(step % self._every, 0) & self._files.writable
        with self._writer.as_default(step), tf.summary.record_if(is_due):
            for variable, gradient in zip(variables, gradients, strict=True):
                tf.summary.histogram(f"weights/{variable.path}", variable.value)
                tf.summary.histogram(f"gradients/{variable.path}", gradient)

    def flush(self) -> None:
        """Writes the histograms of earlier steps to disk. Call it between steps."""
        self._files.flush(self._writer)
