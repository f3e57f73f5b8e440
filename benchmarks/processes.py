"""Programs of this project as processes that can be killed, and that tell what they are at."""

from __future__ import annotations

import contextlib
import functools
import importlib
import mmap
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]


class Program:
    """A process of its own group.

    Args:
      pid: of the process, a child of this one.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.code: int | None = None
        with contextlib.suppress(OSError):  # it may have done so itself, or have ended
            os.setpgid(pid, pid)

    def poll(self) -> int | None:
        """Returns the exit code, minus the signal's number if it was killed; None if it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, seconds: float = 600.0) -> int:
        """Waits until it ends and returns its exit code; kills it if that takes too long."""
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
            time.sleep(0.005)
        return code

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal to all processes of the group."""
        if self.poll() is None:
            os.killpg(self.pid, number)


def start(run: Callable[[], None], folder: Path, log: Path) -> Program:
    """Forks a process that calls `run` in a folder and adds what it prints to a log.

    This process must have made no runtime of TensorFlow, which no fork survives; that it imported
    TensorFlow spares each process the seconds that takes.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _become(run, folder, log)
    return Program(pid)


def _become(run: Callable[[], None], folder: Path, log: Path) -> NoReturn:
    code: Any = 1
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        run()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def script(name: str, flags: Iterable[str], environment: dict[str, str]) -> Callable[[], None]:
    """Returns what runs a script of the project in the process that calls it."""

    def run() -> None:
        os.environ.update(environment)
        tempfile.tempdir = None  # it may be another one in this environment
        sys.argv = [name, *flags]
        runpy.run_path(str(ROOT / name), run_name="__main__")

    return run


def fresh_python(arguments: Iterable[str], environment: dict[str, str]) -> Callable[[], None]:
    """Returns what replaces the process that calls it by a new Python, which imports all anew."""
    return lambda: os.execve(sys.executable, [sys.executable, *arguments], environment)


class Phases:
    """What a forked program is at, in memory that it shares with this process.

    Functions are wrapped so that they write down when they are entered and left. Only programs
    forked afterwards, and not by `fresh_python`, tell of it.

    Args:
      marks: module, function in it (`name` or `Class.method`) and the phase that it is.
    """

    OUTSIDE = "start-up"

    def __init__(self, marks: Iterable[tuple[str, str, str]]) -> None:
        marks = list(marks)
        self.names = [self.OUTSIDE, *dict.fromkeys(phase for _, _, phase in marks)]
        # The current phase's number; then how often each was entered, and seconds in each.
        size = 8 * (1 + 2 * len(self.names))
        self._shared = memoryview(mmap.mmap(-1, size)).cast("d")
        for module, path, phase in marks:
            *parents, name = path.split(".")
            owner = functools.reduce(getattr, parents, importlib.import_module(module))
            setattr(owner, name, self.mark(getattr(owner, name), phase))

    def mark(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """Returns the function so that it tells that it is under way."""
        shared, number, phases = self._shared, self.names.index(phase), len(self.names)

        @functools.wraps(function)
        def marked(*arguments: Any, **named: Any) -> Any:
            before, begin = shared[0], time.monotonic()
            shared[0] = number
            shared[1 + number] += 1
            try:
                return function(*arguments, **named)
            finally:
                shared[0] = before
                shared[1 + phases + number] += time.monotonic() - begin

        return marked

    def reset(self) -> None:
        """Forgets what earlier programs told."""
        for index in range(len(self._shared)):
            self._shared[index] = 0

    @property
    def current(self) -> str:
        """The phase that the program is in, or was when it ended."""
        return self.names[int(self._shared[0])]

    def entries(self, phase: str) -> int:
        """Returns how often a phase was entered."""
        return int(self._shared[1 + self.names.index(phase)])

    def mean_seconds(self, phase: str) -> float:
        """Returns how long a phase took on average, 0 if it was never left."""
        seconds = self._shared[1 + len(self.names) + self.names.index(phase)]
        return seconds / max(self.entries(phase), 1)
