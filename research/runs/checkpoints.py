"""Saves and restores the latest and the best state of a run."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import tensorflow as tf

from research.runs.durable_files import cannot_be_written, reason_of
from research.runs.restore import reading
from research.runs.sealed_files import intact_checkpoints, link, move, point, seal


class Checkpoints:
    """Saves the state to the folder `latest`, and the best state also to the folder `best`.

    A checkpoint and its checksums are written to a temporary folder, and moved when they are on
    disk. Then the pointer file `checkpoint` of each folder is replaced, that of `latest` last. So a
    run that is killed while saving resumes from the previous checkpoint, and repeats the epoch of
    the best checkpoint.

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
        self._names = intact_checkpoints(self._latest)
        if self.latest is None:
            return False
        with reading(self.latest):
            status = self._state.read(self.latest)
            status.assert_existing_objects_matched().assert_consumed()
        return True

    @property
    def latest(self) -> str | None:
        """The path of the last checkpoint saved or restored; None before the first."""
        return str(self._latest / self._names[-1]) if self._names else None
