"""Histograms of trained weights and their gradients, for TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import tensorflow as tf

from research.runs.event_files import EventFiles


class Histograms:
    """Writes histograms from within training steps, every so many of them.

    Args:
      files: of the run; they go beside the figures of training.
      every: steps from one to the next.
    """

    def __init__(self, files: EventFiles, every: int) -> None:
        self._files = files
        self._writer = files.writer("train", ".histograms")
        self._every = every

    def write(
        self,
        step: tf.Tensor,
        variables: Sequence[keras.Variable],
        gradients: Sequence[tf.Tensor],
    ) -> None:
        """Writes them if it is time to; for inside a `tf.function`.

        Args:
          step: updates made, that of these gradients included.
          variables: that were just updated.
          gradients: by which, one a variable.
        """
        is_time = tf.equal(step % self._every, 0) & self._files.writable
        with self._writer.as_default(step), tf.summary.record_if(is_time):
            for variable, gradient in zip(variables, gradients, strict=True):
                tf.summary.histogram(f"weights/{variable.path}", variable.value)
                tf.summary.histogram(f"gradients/{variable.path}", gradient)

    def flush(self) -> None:
        """Writes to disk what steps have written; between steps."""
        self._files.flush(self._writer)
