"""TensorBoard event files. A run continues without them if they cannot be written."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import tensorflow as tf

from research.runs.durable_files import reason_of

# Writers must not flush by themselves: an error would then end a compiled step.
NEVER = 2**31 - 1


class EventFiles:
    """Event files in subfolders of one folder. TensorBoard shows each subfolder as a run.

    A file is created when it is first written to. The first error prints a note on standard error
    and stops all writing.

    Args:
      folder: contains the subfolders.

    Attributes:
      writable: whether no error occurred; a variable that compiled steps can read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[str, tf.summary.SummaryWriter] = {}
        self.writable = tf.Variable(True, trainable=False)

    @contextlib.contextmanager
    def at(self, step: int, subfolder: str = "") -> Iterator[None]:
        """Directs `tf.summary` to a subfolder, for a step; flushes at the end."""
        if subfolder not in self._writers:
            self._writers[subfolder] = self._make(subfolder)
        with self._tolerating_errors(), self._writers[subfolder].as_default(step):
            yield

    def writer(self, subfolder: str, suffix: str) -> tf.summary.SummaryWriter:
        """Returns a writer for compiled steps, which check `writable`; see `flush`."""
        writer = self._make(subfolder, suffix)
        # `as_default` flushes at its end, and an error there would end a compiled step.
        vars(writer)["flush"] = lambda: None
        return writer

    def flush(self, writer: tf.summary.SummaryWriter) -> None:
        """Flushes a writer that `writer` returned."""
        with self._tolerating_errors():
            if self.writable:
                type(writer).flush(writer)

    def _make(self, subfolder: str, suffix: str = "") -> tf.summary.SummaryWriter:
        with self._tolerating_errors():
            if self.writable:
                return tf.summary.create_file_writer(
                    str(self._folder / subfolder), NEVER, NEVER, suffix
                )
        return tf.summary.create_noop_writer()

    def close(self) -> None:
        """Closes the files that `at` created."""
        for writer in self._writers.values():
            writer.close()

    @contextlib.contextmanager
    def _tolerating_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, tf.errors.OpError) as error:
            self.writable.assign(False)
            self._writers = dict.fromkeys(self._writers, tf.summary.create_noop_writer())
            print(
                f"note: TensorBoard events cannot be written to {str(self._folder)!r} "
                f"({reason_of(error)}); continuing without them",
                file=sys.stderr,
                flush=True,
            )
