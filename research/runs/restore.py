"""Finds a checkpoint and restores a model from it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import tensorflow as tf

from research.models.wrapper import Wrapper
from research.optimization.averages import WeightAverages
from research.runs.index_file import check_index
from research.runs.run_directory import RunDirectory
from research.runs.sealed_files import damage_of, intact_checkpoints
from research.system.errors import UserError, first_line

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
        if not names and which == "best" and not RunDirectory(folder.parent).validates():
            raise UserError(
                f"ckpt_dir {str(folder.parent)!r} has no best checkpoint, because the run has no "
                "validation photos; give --checkpoint=latest or a path"
            )
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
    with reading(path):
        step = tf.Variable(0, dtype=tf.int64)
        variables = averages.variables if averages else []
        status = tf.train.Checkpoint(model=model, step=step, averages=variables).read(path)
        status.assert_existing_objects_matched().expect_partial()
    return int(step.numpy())


def check_restorable(path: str) -> None:
    """Raises `UserError` if TensorFlow cannot restore from a path, which it reads as a pattern."""
    found = [character for character in "[\\" if character in os.path.abspath(path)]
    if found:
        raise UserError(
            f"{path!r} contains the character {found[0]!r}, with which TensorFlow finds no "
            "checkpoint; rename the folder, or give another --ckpt_dir"
        )


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Checks the index of a checkpoint; turns any error while reading it into a `UserError`."""
    check_restorable(path)
    try:
        check_index(path)
        yield
    except UNREADABLE as error:
        raise UserError(
            f"checkpoint {path!r} does not fit the model of config.json: {first_line(error)[:200]}"
        ) from error
