"""TensorBoard event files. A run continues without them if they cannot be written."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import tensorflow as tf
from tensorboard.compat.proto import event_pb2

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

    def restart(self, step: int, subfolder: str) -> None:
        """Removes the events from a step on, which an earlier process wrote, before writing others.

        An event SessionLog.START removes them from a TensorBoard that has read them already. It is
        in a file of its own, whose name sorts between those of the earlier process and those that
        TensorFlow will use in this one. TensorBoard ignores the first such event, so that a new run
        writes one too (tensorboard/backend/event_processing/plugin_event_accumulator.py).
        """
        if not self.writable:
            return
        folder, now = self._folder / subfolder, time.time()
        file = folder / f"events.out.tfevents.{int(now):010}.{platform.node()}.{os.getpid()}.0"
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        version = event_pb2.Event(wall_time=now, file_version="brain.Event:2")
        with self._tolerating_errors():
            folder.mkdir(parents=True, exist_ok=True)
            for earlier in folder.glob("events.out.tfevents.*"):
                _keep_events_before(step, earlier)
            restart = event_pb2.Event(wall_time=now, step=step, session_log=start)
            _write_events(file, [version, restart])

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


def _keep_events_before(step: int, file: Path) -> None:
    """Removes later events from a file, and what follows a damaged event."""
    events = []
    with contextlib.suppress(tf.errors.DataLossError):
        for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
            events.append(event_pb2.Event.FromString(record))
    kept = [event for event in events if event.step < step or event.file_version]
    if len(kept) < len(events):
        partial = file.with_name(f"partial-{file.name}")
        _write_events(partial, kept)
        os.replace(partial, file)


def _write_events(file: Path, events: Iterable[event_pb2.Event]) -> None:
    with tf.io.TFRecordWriter(str(file)) as writer:
        for event in events:
            writer.write(event.SerializeToString())
