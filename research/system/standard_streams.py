"""Standard output and standard error whose errors do not stop a program."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO, cast

from research.system.errors import UserError, program_name

BROKEN_PIPE_EXIT_CODE = 128 + signal.SIGPIPE  # as in a shell
FAILED_EXIT_CODE = 1


class SafeStream:
    """A text stream that discards its text after the first error, such as a full disk.

    All other attributes are those of the stream.

    Args:
      stream: receives the text. Characters that its encoding does not have are escaped.
      on_error: is called once, with the first error.

    Attributes:
      error: the first error; None if there was none.
    """

    def __init__(self, stream: TextIO, on_error: Callable[[OSError], object]) -> None:
        self._stream = stream
        self._on_error = on_error
        self.error: OSError | None = None
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self._attempt(self._stream.writelines, lines)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, call: Callable[..., object], *arguments: object) -> None:
        if self.error:
            return
        try:
            call(*arguments)
        except OSError as error:
            self.error = error
            # The buffer still holds text, which Python would try to write again at the exit.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            self._on_error(error)


@contextlib.contextmanager
def safe_streams(stop_at_error: bool = False) -> Iterator[None]:
    """Lets a program go on when its output cannot be written, and tells it in the exit code.

    An error of standard output is printed once on standard error. Exit code 0 becomes 1. If a
    reader has closed its pipe, as `head` does, nothing is printed, and exit code 0 becomes 141.

    Args:
      stop_at_error: whether an error of standard output ends the program, because its output is
        its only result.
    """

    def tell(error: OSError) -> None:
        is_broken_pipe = error.errno == errno.EPIPE
        reason = f"standard output cannot be written ({error.strerror})"
        if stop_at_error and is_broken_pipe:
            sys.exit(BROKEN_PIPE_EXIT_CODE)
        if stop_at_error:
            raise UserError(reason)
        if not is_broken_pipe:
            print(f"{program_name()}: {reason}; continuing without it", file=sys.stderr, flush=True)

    _open_closed_descriptors()
    before = sys.stdout, sys.stderr
    output = SafeStream(sys.stdout or _stream_of(1), tell)
    errors = SafeStream(sys.stderr or _stream_of(2), lambda error: None)
    sys.stdout, sys.stderr = cast(TextIO, output), cast(TextIO, errors)
    try:
        yield
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    finally:
        with contextlib.suppress(SystemExit, UserError):  # the exit code tells it
            output.flush()
        errors.flush()
        sys.stdout, sys.stderr = before
    failures = [error for error in (output.error, errors.error) if error]
    if failures:
        only_pipes = all(error.errno == errno.EPIPE for error in failures)
        sys.exit(BROKEN_PIPE_EXIT_CODE if only_pipes else FAILED_EXIT_CODE)
    sys.exit(0)


def _open_closed_descriptors() -> None:
    """Makes writing to a closed standard stream an error, instead of writing to another file.

    A file that is opened later would get the number of the closed stream.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # gets the lowest free number


def _stream_of(descriptor: int) -> TextIO:
    return open(descriptor, "w", encoding="utf-8", closefd=False)
