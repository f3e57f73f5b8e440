"""How a program ends: with one line on standard error, whatever ended it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

from research.system import interruption
from research.system.errors import UserError, program_name
from research.system.printable import printable

LONGEST_MESSAGE = 2000  # characters


def fail(message: str) -> NoReturn:
    """Ends the process with one line on standard error and exit code 2."""
    line = printable(" ".join(message.split()))
    if len(line) > LONGEST_MESSAGE:  # the value is at its beginning, the way out at its end
        half = LONGEST_MESSAGE // 2
        line = f"{line[:half]} ... {line[-half:]}"
    print(f"{program_name()}: {line}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def ended_by_a_line() -> Iterator[None]:
    """Runs a program; ends the process where it cannot go on.

    A `UserError` gives its line and exit code 2; SIGTERM and SIGINT a line, and the code that
    shells have for them; a reader of standard output that went away no line, and its code.
    """
    try:
        with interruption.raised():
            yield
            sys.stdout.flush()
    except UserError as error:
        fail(str(error))
    except interruption.Interrupted as interrupted:
        print(interrupted.line, file=sys.stderr)
        sys.exit(interrupted.exit_code)
    except BrokenPipeError:  # whoever read what is printed has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
