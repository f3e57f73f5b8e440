"""The last and the best state of a run on disk, and back."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import tensorflow as tf

from research.errors import UserError
from research.model import Wrapper

# What TensorFlow raises for a checkpoint that is damaged, or of another model.
UNREADABLE = (ValueError, AssertionError, IndexError, KeyError, RuntimeError, tf.errors.OpError)


class Checkpoints:
    """Writes the state into the folder `latest`, and keeps the best one in the folder `best`.

    The pointer file `checkpoint` in each is replaced only after a checkpoint is complete, so that a
    run killed while writing resumes from the one before.
    """

    def __init__(self, state: tf.train.Checkpoint, folder: Path) -> None:
        self._state = state
        self._latest = tf.train.CheckpointManager(
            state, str(folder / "latest"), max_to_keep=2, checkpoint_name="step"
        )
        self._best = folder / "best"

    def save(self, step: int, best: bool = False) -> None:
        """Writes the state, and keeps it as the best one too if it is."""
        path = Path(self._latest.save(checkpoint_number=step))
        if best:
            self._keep_best(path)

    def _keep_best(self, path: Path) -> None:
        """Makes the files of a checkpoint known under `best` too, without writing them again."""
        self._best.mkdir(exist_ok=True)
        names = [file.name for file in path.parent.glob(f"{path.name}.*")]
        for name in names:
            partial = self._best / f"{name}.partial"
            partial.unlink(missing_ok=True)
            try:
                os.link(path.parent / name, partial)
            except OSError:  # a file system without hard links
                shutil.copyfile(path.parent / name, partial)
            os.replace(partial, self._best / name)
        # By its name alone, so that the run can be moved.
        tf.compat.v1.train.update_checkpoint_state(str(self._best.absolute()), path.name)
        for file in self._best.iterdir():
            if file.name not in (*names, "checkpoint"):
                file.unlink()

    def restore_latest(self) -> bool:
        """Restores every value of the state from the last checkpoint; False if there is none.

        Raises:
          UserError: the checkpoint cannot be read, or is not of this model and its optimizers.
        """
        path = self.latest
        if path is None:
            return False
        try:
            self._state.restore(path).assert_existing_objects_matched().assert_consumed()
        except UNREADABLE as error:
            raise _does_not_fit(path, error) from error
        return True

    @property
    def latest(self) -> str | None:
        """The path of the last complete checkpoint, None before the first."""
        return self._latest.latest_checkpoint


def find_checkpoint(folder: Path, which: str) -> str:
    """Returns the path, without ending, of `best`, `latest`, or of the checkpoint named.

    Raises:
      UserError: there is no such checkpoint.
    """
    if which in ("best", "latest"):
        path = tf.train.latest_checkpoint(str(folder / which))
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


def restore_model(model: Wrapper, path: str) -> int:
    """Loads every variable of the model from a run's checkpoint; returns its step.

    Raises:
      UserError: the checkpoint cannot be read or is not of this model.
    """
    try:
        step = tf.Variable(0, dtype=tf.int64)
        status = tf.train.Checkpoint(model=model, step=step).restore(path)
        status.assert_existing_objects_matched().expect_partial()
    except UNREADABLE as error:
        raise _does_not_fit(path, error) from error
    return int(step.numpy())


def _does_not_fit(path: str, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return UserError(f"checkpoint {path!r} does not fit the model of config.json: {reason}")
