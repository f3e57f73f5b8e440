"""Traces training steps for TensorBoard's profiler."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import tensorflow as tf

from research.system.errors import first_line


class StepProfiler:
    """Writes one trace of consecutive steps.

    TensorBoard shows it with the package `tensorboard-plugin-profile`; see
    https://www.tensorflow.org/guide/profiler.

    All workers limit their calls alike, because the steps of one call are one collective program.
    If the trace cannot be written, a note is printed, and the training continues.

    Args:
      steps: numbers of the steps to trace, counted from 1; may be empty.
      folder: where TensorBoard finds event files; None in a worker that writes none.
    """

    def __init__(self, steps: range, folder: Path | None) -> None:
        self._steps = steps
        self._folder = folder
        self._first: int | None = None

    def limit(self, step: int, planned: int) -> int:
        """Returns the last step to run in one call after `step`: traced steps run one by one."""
        if step + 1 in self._steps:
            return step + 1
        before_first = self._steps.start - 1
        return min(planned, before_first) if self._steps and step < before_first else planned

    @contextlib.contextmanager
    def traced(self, number: int) -> Iterator[None]:
        """Traces the step with this number, if it is one of the steps to trace."""
        if number not in self._steps or self._folder is None:
            yield
            return
        if self._first is None:  # the first in this process: a run may resume between these steps
            self._first = number
            with self._noted():
                tf.profiler.experimental.start(str(self._folder))
        try:
            with tf.profiler.experimental.Trace("train", step_num=number, _r=1):
                yield
        except BaseException:  # a trace that stays open would refuse those of later runs
            with contextlib.suppress(OSError, tf.errors.OpError):
                tf.profiler.experimental.stop(save=False)
            raise
        if number == self._steps[-1] and self._folder:
            with self._noted():
                tf.profiler.experimental.stop()
                print(f"profile      steps {self._first} to {number}, in TensorBoard", flush=True)

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        """Prints a note about an error of the profiler, and traces no further steps."""
        try:
            yield
        except (OSError, tf.errors.OpError) as error:
            self._folder = None
            print(
                f"note: the trace of the profiler cannot be written ({first_line(error)}); "
                "training continues without it",
                file=sys.stderr,
                flush=True,
            )
