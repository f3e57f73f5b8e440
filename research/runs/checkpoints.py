"""The last and the best state of a run on disk, and back."""

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
from research.runs.sealed_files import damage_of, link, move, point, seal, whole_checkpoints
from research.system.errors import UserError, first_line

# What TensorFlow raises for a checkpoint that is damaged, or of another model.
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
    """Writes the state into the folder `latest`, and keeps the best one in the folder `best`.

    A checkpoint is written aside, with its checksums, and gets its place when the disk has it. The
    pointer file `checkpoint` in each folder is replaced after that; that of `latest` last, so that
    a run killed while writing resumes from the one before and finds the best one again.

    Args:
      state: what to write.
      folder: of `latest` and `best`.
      keep: how many of the last ones stay.
    """

    def __init__(self, state: tf.train.Checkpoint, folder: Path, keep: int = 2) -> None:
        self._state = state
        self._latest, self._best = folder / "latest", folder / "best"
        self._keep = keep
        self._names: list[str] = []

    def save(self, step: int, best: bool = False, validated: bool = True) -> None:
        """Writes the state, and keeps it as the best one too if it is.

        Args:
          step: updates made.
          best: whether it is the best one so far.
          validated: False where an epoch's validation is still to come. The checkpoint after it has
            another name, as a file that is in use is never written over.

        Raises:
          UserError: it cannot be written; those of before stay.
        """
        name = f"step-{step}" if validated else f"step-{step}-unvalidated"
        aside = self._latest / "partial"
        names = [*(kept for kept in self._names if kept != name), name][-self._keep :]
        with self._writing(name, aside):
            self._state.write(str(aside / name))
            seal(aside / name)
            if best:
                link(aside / name, self._best)
                point(self._best, [name])
            move(aside / name, self._latest)
            point(self._latest, names)
        self._names = names

    @contextlib.contextmanager
    def _writing(self, name: str, aside: Path) -> Iterator[None]:
        """Makes the folder `aside` for a while; tells what cannot be written in one line."""
        try:
            shutil.rmtree(aside, ignore_errors=True)  # left by a killed run
            aside.mkdir(parents=True)
            yield
            aside.rmdir()
        except (OSError, tf.errors.OpError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            run = str(self._latest.parent.parent)
            then = f"goes on after {self._names[-1]}" if self._names else "begins anew"
            afterwards = f"repeat the command with --ckpt_dir={shlex.quote(run)}, which {then}"
            raise cannot_be_written(self._latest / name, reason_of(error), afterwards) from error

    def restore_latest(self) -> bool:
        """Restores every value of the state from the last whole checkpoint; False if there is none.

        Raises:
          UserError: there are some but none is whole; or it is not of this model and its
            optimizers.
        """
        self._names = whole_checkpoints(
            self._latest, "restore it from a copy, or remove the folder to begin anew"
        )
        path = self.latest
        if path is None:
            return False
        try:
            check_index(path)
            self._state.read(path).assert_existing_objects_matched().assert_consumed()
        except UNREADABLE as error:
            raise _does_not_fit(path, error) from error
        return True

    @property
    def latest(self) -> str | None:
        """The path of the last checkpoint written or restored, None before the first."""
        return str(self._latest / self._names[-1]) if self._names else None


def find_checkpoint(folder: Path, which: str) -> str:
    """Returns the path, without ending, of `best`, `latest`, or of the checkpoint named.

    A last one that is damaged is passed over for the one before, with a line on standard error.

    Raises:
      UserError: there is no such checkpoint, or none that is whole.
    """
    if which in ("best", "latest"):
        other = "latest" if which == "best" else "best"
        names = whole_checkpoints(folder / which, f"give --checkpoint={other} or a path")
        if not names:
            raise UserError(
                f"ckpt_dir {str(folder.parent)!r} has no {which} checkpoint yet; expected one of "
                "a run that has finished at least an epoch"
            )
        return str(folder / which / names[-1])
    prefix = os.path.abspath(os.path.expanduser(which.removesuffix(".index")))
    if not os.path.exists(prefix + ".index"):
        raise UserError(
            f"checkpoint is {which!r}, and there is no {prefix}.index; expected best, latest, or "
            "the path of a checkpoint without its ending"
        )
    damage = damage_of(Path(prefix))
    if damage:
        raise UserError(
            f"checkpoint is {which!r}, which is not whole: {damage}; expected best, latest, or the "
            "path of another checkpoint"
        )
    return prefix


def restore_model(model: Wrapper, path: str, averages: WeightAverages | None = None) -> int:
    """Loads every variable of the model, and their averages, from a checkpoint; returns its step.

    Raises:
      UserError: the checkpoint cannot be read or is not of this model.
    """
    try:
        check_index(path)
        step = tf.Variable(0, dtype=tf.int64)
        followed = averages.variables if averages else []
        status = tf.train.Checkpoint(model=model, step=step, averages=followed).read(path)
        status.assert_existing_objects_matched().expect_partial()
    except UNREADABLE as error:
        raise _does_not_fit(path, error) from error
    return int(step.numpy())


def _does_not_fit(path: str, error: Exception) -> UserError:
    return UserError(
        f"checkpoint {path!r} does not fit the model of config.json: {first_line(error)[:200]}"
    )
