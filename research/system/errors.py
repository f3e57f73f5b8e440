"""Errors of the user's making, which are told in one line and without a traceback."""

from __future__ import annotations

import re
import sys
from pathlib import Path


class UserError(Exception):
    """A mistake in the input: the message names the value, what was expected and a way out."""


def program_name() -> str:
    """Returns the name of the running program, as messages begin with it."""
    path = Path(sys.argv[0])
    return path.parent.name if path.name == "__main__.py" else path.name


def first_line(error: Exception) -> str:
    """Returns the first line of what an error says, or its name where it says nothing.

    Without what TensorFlow puts around it: the names of a function and of an operation.
    """
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\{\{.*?\}\} | \[Op:.*$", "", line)


def one_line(error: Exception) -> str:
    """Returns all that an error says, in one line, or its name where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
