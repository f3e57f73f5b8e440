"""Tests every flag of every program with valid and invalid values.

python -m tests.fuzzing.bad_flags --cases=2000     # about 4 minutes on two cores

A program must either refuse a command line, with one line on standard error, a non-zero exit code
and no file written; or accept it, with settings that config.json can store. Hypothesis draws the
command lines from the config classes, so that new flags are included. Some of the refused command
lines are repeated as processes.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

from absl import app, flags
from absl.testing import flagsaver
from hypothesis import HealthCheck, Phase, given, settings

from benchmarks.harness import ROOT, write_result
from flags.command_line import run
from research.settings.train_config import TrainConfig
from research.system.printable import printable
from tests.fuzzing.flag_cases import PROGRAMS, Program, command_lines, write_flagfiles

PROCESSES = 40


class ViolationError(AssertionError):
    """A program neither refused a command line in one line nor accepted it."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The reaction to a command line: `refused` with a line, `accepted` or `help`."""

    kind: str
    line: str = ""


@contextlib.contextmanager
def working_folder(folder: Path) -> Iterator[None]:
    """Changes the working directory for the duration of a `with` block."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def outcome_of(program: Program, arguments: Sequence[str]) -> Outcome:
    """Runs a program in this process up to the point where it has its settings.

    Raises:
      ViolationError: the program raised an error, refused the arguments in more than one line, or
        wrote a file.
    """
    accepted: list[object] = []
    out, errors = io.StringIO(), io.StringIO()
    code: object = None
    try:
        with (
            mock.patch.object(sys, "argv", [program.script, *arguments]),
            mock.patch.object(app, "_call_exception_handlers"),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(errors),
            _own_flags(program),
        ):
            run(
                program.config_class,
                lambda config, *_: accepted.append(config),
                program.takes_paths,
            )
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        raise ViolationError(f"{program.script} {arguments!r}: {error!r:.500}") from None
    message = errors.getvalue()
    if any(Path.cwd().iterdir()):
        raise ViolationError(f"{program.script} {arguments!r} wrote a file")
    if accepted:
        check_settings(program, arguments, accepted[0])
        return Outcome("accepted")
    if code in (None, 0) and out.getvalue() and not message:
        return Outcome("help")
    check_refusal(program, arguments, code, message)
    return Outcome("refused", message)


@contextlib.contextmanager
def _own_flags(program: Program) -> Iterator[None]:
    """Removes the flags that a program declares from absl's flags, and restores all values."""
    with flagsaver.flagsaver():
        try:
            yield
        finally:
            for name in program.flags:
                if name in flags.FLAGS:
                    delattr(flags.FLAGS, name)
            flags.FLAGS.unparse_flags()


def check_refusal(program: Program, arguments: Sequence[str], code: object, message: str) -> None:
    """Raises `ViolationError` unless a program ended with one printable line and an error code."""
    (line, *others) = message.splitlines() or [""]
    is_line = line.startswith(f"{program.script}: ") and not others and message.endswith("\n")
    if code in (None, 0) or not is_line or printable(line) != line:
        raise ViolationError(
            f"{program.script} {arguments!r} ended with {code!r} and printed {message!r}"
        )


def check_settings(program: Program, arguments: Sequence[str], config: object) -> None:
    """Raises `ViolationError` if settings change when written to config.json and read again."""
    if isinstance(config, TrainConfig) and TrainConfig.from_json(config.to_json()) != config:
        raise ViolationError(
            f"{program.script} {arguments!r}: config.json does not preserve the settings"
        )


def run_process(program: str, arguments: Sequence[str], folder: Path) -> tuple[int, str]:
    """Runs a program in a folder without network; returns its exit code and standard error."""
    nowhere = "http://127.0.0.1:9"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "http_proxy": nowhere}
    done = subprocess.run(
        [sys.executable, str(ROOT / program), *map(os.fsencode, arguments)],
        cwd=folder,
        env={**environment, "https_proxy": nowhere, "no_proxy": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=300,
    )
    return done.returncode, done.stderr.decode("utf-8", "replace")


class Trial:
    """Runs programs with drawn command lines and counts the outcomes.

    Args:
      folder: an empty folder, for flagfiles and as the working directory.
      derandomize: whether to draw the same command lines every time.
    """

    def __init__(self, folder: Path, derandomize: bool = True) -> None:
        self._flagfiles, self._empty = folder / "flagfiles", folder / "empty"
        write_flagfiles(self._flagfiles)
        self._empty.mkdir()
        self._derandomize = derandomize
        self.counts: dict[str, collections.Counter[str]] = {
            program.script: collections.Counter() for program in PROGRAMS
        }
        self.refused: list[tuple[Program, list[str]]] = []

    def draw(self, program: Program, name: str | None, cases: int) -> None:
        """Runs a program with command lines that contain a flag, or any flags if `name` is None.

        Raises:
          ViolationError: with the shortest command line found that the program does not handle.
        """

        @settings(
            max_examples=cases,
            derandomize=self._derandomize,
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        )
        @given(command_lines(program, name, self._flagfiles))
        def check(arguments: list[str]) -> None:
            outcome = outcome_of(program, arguments)
            self.counts[program.script][outcome.kind] += 1
            if outcome.kind == "refused":
                self.refused.append((program, arguments))

        with working_folder(self._empty):
            check()

    @property
    def cases(self) -> int:
        """The number of command lines drawn."""
        return sum(sum(counts.values()) for counts in self.counts.values())

    def as_processes(self, count: int) -> None:
        """Runs `count` of the refused command lines as processes, at regular intervals.

        Raises:
          ViolationError: see `check_refusal`.
        """
        step = max(1, len(self.refused) // count)
        for program, arguments in self.refused[::step][:count]:
            code, message = run_process(program.script, arguments, self._empty)
            check_refusal(program, arguments, code, message)
            if any(self._empty.iterdir()):
                raise ViolationError(f"{program.script} {arguments!r} wrote a file")


def main() -> None:
    """Draws, counts and writes the figures; exit code 1 for a violation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000, help="number of command lines")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        trial = Trial(Path(name), derandomize=False)
        number_of_flags = sum(len(program.flags) for program in PROGRAMS)
        try:
            for program in PROGRAMS:
                for flag in program.flags:
                    trial.draw(program, flag, -(-arguments.cases // number_of_flags))
                trial.draw(program, None, 50)
            trial.as_processes(PROCESSES)
        except ViolationError as error:
            sys.exit(str(error))
    for script, counts in trial.counts.items():
        print(f"{script:<16}", dict(counts))
    print(f"{trial.cases} command lines, {PROCESSES} of them also as processes; 0 violations")
    result = {
        "command_lines": trial.cases,
        "flags": number_of_flags,
        "as_processes_too": PROCESSES,
        "violations": 0,
        "outcomes": {script: dict(counts) for script, counts in trial.counts.items()},
    }
    write_result("bad_flags", result)


if __name__ == "__main__":
    main()
