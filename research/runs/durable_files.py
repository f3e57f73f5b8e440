"""Writes files so that they are whole or not there, also after the power failed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from research.system.errors import UserError, first_line


@contextlib.contextmanager
def stored(path: Path) -> Iterator[None]:
    """Makes an error of the storage a `UserError` that names the file, the reason, a way out."""
    try:
        yield
    except OSError as error:
        raise cannot_be_written(path, reason_of(error)) from error


def cannot_be_written(path: Path, reason: str, afterwards: str = "repeat the command") -> UserError:
    """Returns the error that says so; `afterwards` is what to do once there is room."""
    return UserError(
        f"{str(path)!r} cannot be written ({reason}); make room for it, or give the right to "
        f"write there, and {afterwards}"
    )


def reason_of(error: Exception) -> str:
    """Returns what the system says of an error of storage: Python's, or one of TensorFlow's."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error).rpartition("; ")[2]  # TensorFlow names a path before it


def write_file(path: Path, content: str | bytes) -> None:
    """Writes a file atomically, and the folders that it lies in.

    Raises:
      UserError: it cannot be written.
    """
    with stored(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader finds the old content or the new, never a part."""
    partial = path.with_name(path.name + ".partial")
    try:
        # A link that lies there must not lead the writing elsewhere.
        partial.unlink(missing_ok=True)
        with partial.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def append_line(path: Path, line: str) -> None:
    """Adds a line to a file, which is on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Waits until the disk has a file's content, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
