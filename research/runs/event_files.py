"""TensorBoard's event files, without which a run goes on where they cannot be written."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import tensorflow as tf

from research.runs.durable_files import reason_of

# A writer of a compiled step writes nothing by itself, so that no error comes up within a step.
NEVER = 2**31 - 1


class EventFiles:
    """Event files in subfolders of one folder, which TensorBoard shows as runs.

    Each is made when it is first written to. After a first error, told in one line on standard
    error, nothing more is written to any of them.

    Args:
      folder: of all of them.

    Attributes:
      writable: whether none has failed; a variable, which compiled steps can read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[str, tf.summary.SummaryWriter] = {}
        self._flush: dict[tf.summary.SummaryWriter, Callable[[], None]] = {}
        self.writable = tf.Variable(True, trainable=False)

    @contextlib.contextmanager
    def at(self, step: int, subfolder: str = "") -> Iterator[None]:
        """Lets `tf.summary` within write for a step; on disk when this ends."""
        if subfolder not in self._writers:
            self._writers[subfolder] = self._make(subfolder)
        with self._going_on(), self._writers[subfolder].as_default(step):
            yield

    def writer(self, subfolder: str, suffix: str) -> tf.summary.SummaryWriter:
        """Returns a writer for use in compiled steps, which check `writable`; see `flush`."""
        writer = self._make(subfolder, suffix)
        # At its end `as_default` flushes, and a compiled step would fail where that does.
        self._flush[writer] = writer.flush
        vars(writer)["flush"] = lambda: None
        return writer

    def flush(self, writer: tf.summary.SummaryWriter) -> None:
        """Writes to disk what compiled steps wrote with a writer."""
        with self._going_on():
            if self.writable:
                self._flush[writer]()

    def _make(self, subfolder: str, suffix: str = "") -> tf.summary.SummaryWriter:
        with self._going_on():
            if self.writable:
                return tf.summary.create_file_writer(
                    str(self._folder / subfolder), NEVER, NEVER, suffix
                )
        return tf.summary.create_noop_writer()

    def close(self) -> None:
        """Closes the files that `at` has made."""
        for writer in self._writers.values():
            writer.close()

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        try:
            yield
        except (OSError, tf.errors.OpError) as error:
            self.writable.assign(False)
            self._writers = dict.fromkeys(self._writers, tf.summary.create_noop_writer())
            print(
                f"note: events for TensorBoard cannot be written to {str(self._folder)!r} "
                f"({reason_of(error)}); the rest goes on without them",
                file=sys.stderr,
                flush=True,
            )
