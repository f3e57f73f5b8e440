"""Handles the signals that ask a process to stop: SIGTERM and Ctrl-C (SIGINT).

Python runs its signal handlers between two bytecode instructions, so that TensorFlow's C++ code is
never interrupted. Signals that the process ignored at its start stay ignored. A second signal ends
the process immediately, by the operating system's default action.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from research.system.errors import program_name

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A handler of the module `signal`: a function, or a constant such as SIG_DFL.
Handler = Callable[[int, FrameType | None], Any] | int


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to stop.

    Args:
      number: the signal's number.
      outcome: the state of the work; printed after the signal's name.
    """

    def __init__(self, number: int, outcome: str = "") -> None:
        super().__init__(number, outcome)
        self.number = number
        self.outcome = outcome

    @property
    def exit_code(self) -> int:
        """The exit code that shells use: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + self.number

    @property
    def line(self) -> str:
        """The line to print on standard error."""
        is_ctrl_c = self.number == signal.SIGINT
        name = "Ctrl-C (SIGINT)" if is_ctrl_c else signal.Signals(self.number).name
        return f"{program_name()}: interrupted by {name}{self.outcome}"


@dataclasses.dataclass
class Request:
    """A request to stop.

    Attributes:
      number: the signal that made the request; None if there was none.
    """

    number: int | None = None


@contextlib.contextmanager
def deferred() -> Iterator[Request]:
    """Records the first signal in a request. The caller checks it and stops at a safe point."""
    request = Request()

    def note(number: int, _: FrameType | None) -> None:
        request.number = number
        _handle(signal.SIG_DFL)

    before = _handle(note)
    try:
        yield request
    finally:
        # In a program, a second signal ends the process. A Python session goes on.
        if request.number is None or not any(isinstance(one, _Raise) for one in before.values()):
            _restore(before)


class _Raise:
    """A handler that raises `Interrupted` at the first signal; the program then ends."""

    def __call__(self, number: int, _: FrameType | None) -> None:
        _handle(signal.SIG_DFL)
        raise Interrupted(number)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Raises `Interrupted` in the main thread at the first signal."""
    interrupt = _Raise()

    def end_if_interrupted(unraisable: sys.UnraisableHookArgs) -> None:
        # Python drops exceptions that are raised in finalizers.
        if isinstance(unraisable.exc_value, Interrupted):
            _end(unraisable.exc_value.number, 2)
        hook(unraisable)

    hook, before = sys.unraisablehook, _handle(interrupt)
    sys.unraisablehook = end_if_interrupted
    try:
        yield
    finally:
        sys.unraisablehook = hook
        # After a signal the process is about to end, and a second signal ends it immediately.
        if any(signal.getsignal(number) is interrupt for number in before):
            _restore(before)


def at_once(standard_error: int) -> contextlib.AbstractContextManager[None]:
    """Ends the process at a signal without an exception, where one could be lost.

    Args:
      standard_error: file descriptor to print the line on.
    """
    return _handled_by(lambda number, _: _end(number, standard_error))


def by_the_system() -> contextlib.AbstractContextManager[None]:
    """Lets the operating system end the process at a signal, where no Python code can run."""
    return _handled_by(signal.SIG_DFL)


@contextlib.contextmanager
def _handled_by(handler: Handler) -> Iterator[None]:
    before = _handle(handler)
    try:
        yield
    finally:
        _restore(before)


def _handle(handler: Handler) -> dict[signal.Signals, Handler]:
    """Sets a handler for all signals that are not ignored, and returns the previous handlers."""
    if threading.current_thread() is not threading.main_thread():
        return {}  # only the main thread receives signals and may set handlers
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


def _end(number: int, standard_error: int) -> NoReturn:
    interrupted = Interrupted(number)
    with contextlib.suppress(OSError):
        os.write(standard_error, f"{interrupted.line}\n".encode())
    os._exit(interrupted.exit_code)
