"""What a process does when it is asked to end, by SIGTERM or by Ctrl-C (SIGINT).

A handler of Python's runs between two lines of Python: TensorFlow's own code is not cut short.
Signals that the process was started to ignore stay ignored. A second signal ends the process at
once, by the system's own doing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from research.system.errors import program_name

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# As the module `signal` has them: a function, or a number such as SIG_DFL.
Handler = Callable[[int, FrameType | None], Any] | int


class Interrupted(KeyboardInterrupt):
    """The process was asked to end.

    Args:
      number: of the signal.
      outcome: what became of the work, to be told after the signal's name.
    """

    def __init__(self, number: int, outcome: str = "") -> None:
        super().__init__(number, outcome)
        self.number = number
        self.outcome = outcome

    @property
    def exit_code(self) -> int:
        """As a shell has it: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + self.number

    @property
    def line(self) -> str:
        """What to tell the user."""
        return _line(self.number, self.outcome)


class Request:
    """Whether the process was asked to end, and by which signal."""

    def __init__(self) -> None:
        self.number: int | None = None

    @property
    def is_made(self) -> bool:
        """Whether it was."""
        return self.number is not None


@contextlib.contextmanager
def deferred() -> Iterator[Request]:
    """Lets what is within go on after a first signal; it is to ask, and to end when it can."""
    request = Request()

    def note(number: int, _: FrameType | None) -> None:
        request.number = number
        _leave_to_the_system()

    before = _handle(note)
    try:
        yield request
    finally:
        if not request.is_made:
            _restore(before)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Makes a first signal an `Interrupted` in the main thread."""

    def interrupt(number: int, _: FrameType | None) -> None:
        _leave_to_the_system()
        raise Interrupted(number)

    def not_swallowed(unraisable: sys.UnraisableHookArgs) -> None:
        # It came where Python drops exceptions: while something was cleared away.
        if isinstance(unraisable.exc_value, Interrupted):
            _end(unraisable.exc_value.number, 2)
        hook(unraisable)

    hook, before = sys.unraisablehook, _handle(interrupt)
    sys.unraisablehook = not_swallowed
    try:
        yield
    finally:
        sys.unraisablehook = hook
        # After a signal the process is about to end: a second one ends it at once.
        if any(signal.getsignal(number) is interrupt for number in before):
            _restore(before)


@contextlib.contextmanager
def at_once(standard_error: int) -> Iterator[None]:
    """Ends the process on a signal without unwinding; where an exception could get lost.

    Args:
      standard_error: file descriptor to tell it on.
    """
    before = _handle(lambda number, _: _end(number, standard_error))
    try:
        yield
    finally:
        _restore(before)


@contextlib.contextmanager
def by_the_system() -> Iterator[None]:
    """Lets the system end the process on a signal; where no line of Python gets to run."""
    before = _handle(signal.SIG_DFL)
    try:
        yield
    finally:
        _restore(before)


def _handle(handler: Handler) -> dict[signal.Signals, Handler]:
    """Sets a handler for all signals that are not ignored, and returns those of before."""
    if threading.current_thread() is not threading.main_thread():
        return {}  # only the main thread may, and gets signals
    before = {}
    for number in SIGNALS:
        found = signal.getsignal(number)
        if found not in (signal.SIG_IGN, None):
            before[number] = found
            signal.signal(number, handler)
    return before


def _restore(handlers: dict[signal.Signals, Handler]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _leave_to_the_system() -> None:
    _handle(signal.SIG_DFL)


def _line(number: int, outcome: str = "") -> str:
    name = "Ctrl-C (SIGINT)" if number == signal.SIGINT else signal.Signals(number).name
    return f"{program_name()}: interrupted by {name}{outcome}"


def _end(number: int, standard_error: int) -> NoReturn:
    os.write(standard_error, f"{_line(number)}\n".encode())
    os._exit(128 + number)
