"""Saves and restores the latest and the best state of a run."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import tensorflow as tf

from research.models.wrapper import Wrapper
from research.optimization.averages import WeightAverages
from research.runs.durable_files import cannot_be_written, reason_of
from research.runs.index_file import check_index
from research.runs.sealed_files import damage_of, intact_checkpoints, link, move, point, seal
from research.system.errors import UserError, first_line

# TensorFlow raises these for a checkpoint that is damaged or of another model.
UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    AssertionError,
    IndexError,
    KeyError,
    RuntimeError,
    tf.errors.OpError,
)


class Checkpoints:
    """Saves the state to the folder `latest`, and the best state to the folder `best` too.

    A checkpoint is written to a temporary folder, with its checksums, and moved to its place once
    it is on disk. The pointer file `checkpoint` of each folder is replaced after that, the one of
    `latest` last: a run killed while saving resumes from the previous checkpoint, and repeats the
    epoch that gave the best one.

    Args:
      state: the values to save.
      folder: contains `latest` and `best`.
      keep: number of checkpoints to keep in `latest`.
    """

    def __init__(self, state: tf.train.Checkpoint, folder: Path, keep: int = 2) -> None:
        self._state = state
        self._latest, self._best = folder / "latest", folder / "best"
        self._keep = keep
        self._names: list[str] = []

    def save(self, step: int, best: bool = False, validated: bool = True) -> None:
        """Saves the state.

        Args:
          step: number of updates made.
          best: whether this is the best state so far.
          validated: False if the validation of this epoch has not finished. The checkpoint then has
            another name than the one after the validation, so that no file in use is overwritten.

        Raises:
          UserError: the checkpoint cannot be written; earlier checkpoints are kept.
        """
        name = f"step-{step}" if validated else f"step-{step}-unvalidated"
        partial = self._latest / "partial"
        names = [*(kept for kept in self._names if kept != name), name][-self._keep :]
        try:
            shutil.rmtree(partial, ignore_errors=True)  # left by a killed run
            partial.mkdir(parents=True)
            self._state.write(str(partial / name))
            seal(partial / name)
            if best:
                link(partial / name, self._best)
                point(self._best, [name])
            move(partial / name, self._latest)
            point(self._latest, names)
            partial.rmdir()
        except (OSError, tf.errors.OpError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            run = shlex.quote(str(self._latest.parent.parent))
            start = f"resumes after {self._names[-1]}" if self._names else "starts over"
            way_out = f"repeat the command with --ckpt_dir={run}, which {start}"
            raise cannot_be_written(self._latest / name, reason_of(error), way_out) from error
        self._names = names

    def restore_latest(self) -> bool:
        """Restores every value of the state from the latest intact checkpoint.

        Returns:
          Whether there is a checkpoint.

        Raises:
          UserError: all checkpoints are damaged, or the checkpoint is of another model or other
            optimizers.
        """
        self._names = intact_checkpoints(
            self._latest, "restore one from a backup, or remove the folder to start over"
        )
        if self.latest is None:
            return False
        with _reading(self.latest):
            status = self._state.read(self.latest)
            status.assert_existing_objects_matched().assert_consumed()
        return True

    @property
    def latest(self) -> str | None:
        """The path of the last checkpoint saved or restored; None before the first."""
        return str(self._latest / self._names[-1]) if self._names else None


def find_checkpoint(folder: Path, which: str) -> str:
    """Returns the path of a checkpoint, without its file extension.

    If the newest checkpoint is damaged, the one before it is used, with a note on standard error.

    Args:
      folder: contains `latest` and `best`.
      which: `best`, `latest`, or the path of a checkpoint.

    Raises:
      UserError: there is no such checkpoint, or it is damaged.
    """
    if which in ("best", "latest"):
        other = "latest" if which == "best" else "best"
        names = intact_checkpoints(folder / which, f"give --checkpoint={other} or a path")
        if not names:
            raise UserError(
                f"ckpt_dir {str(folder.parent)!r} has no {which} checkpoint yet; expected a run "
                "that has finished at least one epoch"
            )
        return str(folder / which / names[-1])
    prefix = os.path.abspath(os.path.expanduser(which.removesuffix(".index")))
    damage = damage_of(Path(prefix))
    if damage:
        raise UserError(
            f"checkpoint is {which!r}, and {prefix!r} is not an intact checkpoint: {damage}; "
            "expected best, latest, or the path of a checkpoint without its file extension"
        )
    return prefix


def restore_model(model: Wrapper, path: str, averages: WeightAverages | None = None) -> int:
    """Restores all variables of a model, and their averages, from a checkpoint.

    Returns:
      The step at which the checkpoint was saved.

    Raises:
      UserError: the checkpoint cannot be read or is of another model.
    """
    with _reading(path):
        step = tf.Variable(0, dtype=tf.int64)
        variables = averages.variables if averages else []
        status = tf.train.Checkpoint(model=model, step=step, averages=variables).read(path)
        status.assert_existing_objects_matched().expect_partial()
    return int(step.numpy())


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """Checks the index of a checkpoint; turns any error while reading it into a `UserError`."""
    try:
        check_index(path)
        yield
    except UNREADABLE as error:
        raise UserError(
            f"checkpoint {path!r} does not fit the model of config.json: {first_line(error)[:200]}"
        ) from error
