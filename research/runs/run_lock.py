"""Lets one process at a time train in a run's folder."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import filelock

from research.system.errors import UserError

LOCK = "run.lock"


class RunLock:
    """A lock of the system's, which is gone with the process that holds it, however it ends.

    The file is there while the lock is held, and says by whom: two lines, process and machine. One
    that a dead process left is no obstacle.

    Args:
      folder: of the run. Building a lock touches nothing on disk.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / LOCK
        # Fails on a file that was removed meanwhile, when its holder let go.
        self._lock = filelock.FileLock(self._file, timeout=0)

    def acquire(self) -> None:
        """Takes the lock, and makes the folder if need be; does nothing where it is held already.

        Raises:
          UserError: another process holds it, or it cannot be written.
        """
        if self._lock.is_locked:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            self._file.write_text(f"{os.getpid()}\n{platform.node()}\n", encoding="utf-8")
        except filelock.Timeout as error:
            raise UserError(
                f"ckpt_dir {str(self._folder)!r} is being trained by {self._holder()}; wait until "
                "that has ended, or give another --ckpt_dir"
            ) from error
        except OSError as error:
            raise UserError(
                f"ckpt_dir is {str(self._folder)!r}, which cannot be written ({error.strerror}); "
                "make room or give the right to write there, or give another --ckpt_dir"
            ) from error

    def release(self) -> None:
        """Removes the file and lets go; does nothing where the lock is not held."""
        if self._lock.is_locked:
            self._file.unlink(missing_ok=True)
            self._lock.release()

    def _holder(self) -> str:
        try:
            process, machine = self._file.read_text(encoding="utf-8").split()[:2]
        except (OSError, ValueError):  # it has not written its name yet
            return "another process"
        return f"process {process} on {machine}"
