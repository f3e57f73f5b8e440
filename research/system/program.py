"""Ends a program with one line on standard error and an exit code."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import NoReturn

from research.system import interruption
from research.system.errors import (
    Raised,
    UserError,
    one_line,
    program_name,
    raised_in_pipeline,
)
from research.system.garbage import release
from research.system.printable import printable
from research.system.python_file import place_in_own_file

LONGEST_MESSAGE = 2000  # characters


def fail(message: str, exit_code: int = UserError.exit_code) -> NoReturn:
    """Ends the process with one line on standard error."""
    line = printable(" ".join(message.split()))
    if len(line) > LONGEST_MESSAGE:  # keep the value at the start and the way out at the end
        half = LONGEST_MESSAGE // 2
        line = f"{line[:half]} ... {line[-half:]}"
    print(f"{program_name()}: {line}", file=sys.stderr)
    sys.exit(exit_code)


@contextlib.contextmanager
def ended_by_a_line() -> Iterator[None]:
    """Runs a program, and ends the process if the program cannot continue.

    A `UserError` prints its line and gives exit code 2, or 75 if all workers have to start again.
    SIGTERM and SIGINT print a line and give 143 and 130. An exception in the code of a user's file
    prints its line there, and gives exit code 2. Both are also recognised in the message of an
    exception of TensorFlow, which calls the Python code of the input pipeline.
    """
    try:
        with interruption.raised():
            yield
            sys.stdout.flush()
    except UserError as error:
        fail(str(error), error.exit_code)
    except interruption.Interrupted as interrupted:
        print(interrupted.line, file=sys.stderr)
        sys.exit(interrupted.exit_code)
    except Exception as error:
        place, in_pipeline = place_in_own_file(error), raised_in_pipeline(error)
        if in_pipeline:
            release(error)
        raised = in_pipeline or Raised(type(error).__name__, one_line(error))
        if raised.is_user_error:
            fail(raised.message)
        if place is None:
            raise
        fail(f"{place}: {raised.name.rpartition('.')[2]}: {raised.message}")
