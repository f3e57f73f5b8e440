"""User errors, which are printed in one line without a traceback."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple


class UserError(Exception):
    """An invalid input. The message names the value, the expected value and the way out."""

    exit_code = 2


class WorkerLostError(UserError):
    """Another worker of the run has ended or does not answer, so that all have to start again."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h; a loop that starts programs again can tell it


class Raised(NamedTuple):
    """An exception of Python code.

    Attributes:
      name: of its class, with the module.
      message: as the exception was raised with.
    """

    name: str
    message: str

    @property
    def is_user_error(self) -> bool:
        """Whether it is a `UserError`."""
        return self.name == f"{UserError.__module__}.{UserError.__name__}"


def raised_in_pipeline(error: Exception) -> Raised | None:
    """Returns the Python exception that TensorFlow has replaced with one of its own.

    TensorFlow calls the Python code of an input pipeline, and puts the exception and its traceback
    into the message of a `tf.errors.OpError`. The result is None for other errors.
    """
    _, found, embedded = str(error).rpartition("Traceback (most recent call last):\n")
    match = re.search(r"\n\n(\w[\w.<>]*)(?:: (.*?))?\n\n\n\t ", embedded, re.DOTALL)
    return Raised(match[1], match[2] or "") if found and match else None


def program_name() -> str:
    """Returns the name of the running program, which starts every message."""
    path = Path(sys.argv[0])
    return path.parent.name if path.name == "__main__.py" else path.name


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or its type if the message is empty.

    The function and operation names that TensorFlow adds are removed.
    """
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\{\{.*?\}\} | \[Op:.*$", "", line)


def one_line(error: Exception) -> str:
    """Returns an error's message in one line, or its type if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__
