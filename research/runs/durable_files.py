"""Writes files so that a crash or a power failure leaves no partial file."""

from __future__ import annotations

import contextlib
import glob
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from research.system.errors import UserError, first_line


@contextlib.contextmanager
def _stored(path: Path) -> Iterator[None]:
    """Turns an `OSError` into a `UserError` that names the file, the reason and the way out."""
    try:
        yield
    except OSError as error:
        raise cannot_be_written(path, reason_of(error)) from error


def cannot_be_written(path: Path, reason: str, way_out: str = "repeat the command") -> UserError:
    """Returns an error; `way_out` says what to do once the file can be written."""
    return UserError(
        f"{str(path)!r} cannot be written ({reason}); free disk space or change the permissions, "
        f"and {way_out}"
    )


def reason_of(error: Exception) -> str:
    """Returns the operating system's message of an `OSError` or a TensorFlow error."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error).rpartition("; ")[2]  # TensorFlow puts the path before it


def write_file(path: Path, content: str | bytes) -> None:
    """Creates the parent folders and writes a file atomically.

    Raises:
      UserError: the file cannot be written.
    """
    with _stored(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader finds the old or the new content, never a part."""
    _remove_unfinished(path)
    partial = path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.partial")
    try:
        # Opened exclusively: a symbolic link with this name must not redirect the write.
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


def _remove_unfinished(path: Path) -> None:
    """Removes what killed processes of this machine have left of a file."""
    for partial in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
        host, _, process = partial.name.removesuffix(".partial").rpartition("-")
        if not host.endswith(f".{platform.node()}") or not process.isdecimal():
            continue
        try:
            if int(process) != os.getpid():
                os.kill(int(process), 0)  # raises an error if there is no such process
                continue
        except ProcessLookupError:
            pass
        except OSError:  # a process of another user
            continue
        partial.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Appends a line to a file and waits until it is on disk.

    Raises:
      UserError: the line cannot be written.
    """
    with _stored(path), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Waits until a file's content, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
