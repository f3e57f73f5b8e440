"""The last and the best state of a run on disk, and back."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import tensorflow as tf

from research.averages import WeightAverages
from research.checkpoint_index import check_index
from research.errors import UserError
from research.model import Wrapper

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

    The pointer file `checkpoint` in each is replaced only after a checkpoint is complete, so that a
    run killed while writing resumes from the one before; that of `latest` last, so that such a run
    finds the best one again.
    """

    def __init__(self, state: tf.train.Checkpoint, folder: Path) -> None:
        self._state = state
        self._latest, self._best = folder / "latest", folder / "best"

    def save(self, step: int, best: bool = False) -> None:
        """Writes the state, and keeps it as the best one too if it is."""
        name, before = f"step-{step}", self.latest
        self._latest.mkdir(parents=True, exist_ok=True)
        self._state.write(str(self._latest / name))
        if best:
            _link(self._latest, self._best, name)
            _point(self._best, [name])
        kept = [Path(before).name] if before and Path(before).name != name else []
        _point(self._latest, [*kept, name])

    def restore_latest(self) -> bool:
        """Restores every value of the state from the last checkpoint; False if there is none.

        Raises:
          UserError: the checkpoint cannot be read, or is not of this model and its optimizers.
        """
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
        """The path of the last complete checkpoint, None before the first."""
        return latest_in(self._latest)


def _link(source: Path, target: Path, name: str) -> None:
    """Makes the files of a checkpoint known in another folder too, without writing them again."""
    target.mkdir(exist_ok=True)
    for file in [*source.glob(f"{name}.index"), *source.glob(f"{name}.data-*")]:
        partial = target / f"{file.name}.partial"
        partial.unlink(missing_ok=True)
        try:
            os.link(file, partial)
        except OSError:  # a file system without hard links
            shutil.copyfile(file, partial)
        os.replace(partial, target / file.name)


def _point(folder: Path, names: list[str]) -> None:
    """Names a folder's complete checkpoints, the last one last; removes the files of others."""
    # By their names alone, so that a run can be moved.
    tf.compat.v1.train.update_checkpoint_state(str(folder.absolute()), names[-1], names)
    for pattern in ("step-*.index", "step-*.data-*", "*.partial"):
        for file in folder.glob(pattern):
            if file.name.partition(".")[0] not in names or file.suffix == ".partial":
                file.unlink()


def latest_in(folder: Path) -> str | None:
    """Returns the path, without ending, of a folder's last complete checkpoint; None without one.

    A pointer that cannot be read, or that leads out of the folder, counts as none.
    """
    try:
        path = tf.train.latest_checkpoint(str(folder))
    except (ValueError, tf.errors.OpError):  # not text, or no path
        return None
    return path if path and Path(path).parent == folder else None


def find_checkpoint(folder: Path, which: str) -> str:
    """Returns the path, without ending, of `best`, `latest`, or of the checkpoint named.

    Raises:
      UserError: there is no such checkpoint.
    """
    if which in ("best", "latest"):
        path = latest_in(folder / which)
        if path is None:
            raise UserError(
                f"ckpt_dir {str(folder.parent)!r} has no {which} checkpoint yet; expected one of "
                "a run that has finished at least an epoch"
            )
        return path
    prefix = os.path.abspath(os.path.expanduser(which.removesuffix(".index")))
    if not os.path.exists(prefix + ".index"):
        raise UserError(
            f"checkpoint is {which!r}, and there is no {prefix}.index; expected best, latest, or "
            "the path of a checkpoint without its ending"
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
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return UserError(f"checkpoint {path!r} does not fit the model of config.json: {reason}")
