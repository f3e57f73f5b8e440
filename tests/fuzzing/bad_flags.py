"""Gives every flag of every program what a person, or a slip of the hand, could give it.

python -m tests.fuzzing.bad_flags --cases=2000     # about 4 minutes on two cores

Each case is a command line that a program refuses, with one line on standard error, a non-zero
exit code and nothing on disk; or one that it takes, with settings that config.json can hold. The
cases are drawn by Hypothesis from the config classes, so that a new flag is among them; a share of
those refused, and mistakes that are only seen once TensorFlow runs, are made as processes.
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

from benchmarks.record import write_result
from flags.command_line import run_with_paths
from research.settings.train_config import TrainConfig
from research.system.printable import printable
from tests.fuzzing.flag_cases import PROGRAMS, Program, command_lines, write_flagfiles

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = 40


class ViolationError(AssertionError):
    """A program met a command line neither with a line nor with settings."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command line was met: `refused` with a line, `taken` with settings, or `help`."""

    kind: str
    line: str = ""


@contextlib.contextmanager
def working_folder(folder: Path) -> Iterator[None]:
    """Makes a folder the one that relative paths are looked for in."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def meet(program: Program, arguments: Sequence[str]) -> Outcome:
    """Gives arguments to a program in this process, all but what it does with its settings.

    Raises:
      ViolationError: it ended in another way than with a line or with settings, or wrote a file.
    """
    taken: list[tuple[object, list[str]]] = []
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
            run_with_paths(
                program.config_class,
                lambda config, paths: taken.append((config, paths)),
                program.takes_paths,
            )
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        raise ViolationError(f"{program.script} {arguments!r}: {error!r:.500}") from None
    said = errors.getvalue()
    if any(Path.cwd().iterdir()):
        raise ViolationError(f"{program.script} {arguments!r} left something on disk")
    if taken:
        check_settings(program, arguments, taken[0][0])
        return Outcome("taken")
    if code in (None, 0) and out.getvalue() and not said:
        return Outcome("help")
    check_refusal(program, arguments, code, said)
    return Outcome("refused", said)


@contextlib.contextmanager
def _own_flags(program: Program) -> Iterator[None]:
    """Takes the flags that a program declares back out of absl's, and all values with them."""
    with flagsaver.flagsaver():
        try:
            yield
        finally:
            for name in program.flags:
                if name in flags.FLAGS:
                    delattr(flags.FLAGS, name)
            flags.FLAGS.unparse_flags()


def check_refusal(program: Program, arguments: Sequence[str], code: object, said: str) -> None:
    """Raises `ViolationError` unless a program ended with one line that a terminal can show."""
    (line, *others) = said.splitlines() or [""]
    right = line.startswith(f"{program.script}: ") and not others and said.endswith("\n")
    if code in (None, 0) or not right or printable(line) != line:
        raise ViolationError(
            f"{program.script} {arguments!r} ended with {code!r} and said {said!r}"
        )


def check_settings(program: Program, arguments: Sequence[str], config: object) -> None:
    """Raises `ViolationError` unless settings are the same once written down and read again."""
    if isinstance(config, TrainConfig) and TrainConfig.from_json(config.to_json()) != config:
        raise ViolationError(f"{program.script} {arguments!r}: config.json would say otherwise")


def run_process(program: str, arguments: Sequence[str], folder: Path) -> tuple[int, str]:
    """Runs a program in a folder, without a network; returns its exit code and standard error."""
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
    """Meets programs with drawn command lines, and counts how that went.

    Args:
      folder: an empty one, for flagfiles and as the working folder.
      derandomize: draw the same command lines every time.
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

    def every_flag(self, cases_a_flag: int) -> None:
        """Meets every flag of every program with so many command lines that have it."""
        for program in PROGRAMS:
            for name in program.flags:
                self.draw(program, name, cases_a_flag)

    def draw(self, program: Program, name: str | None, cases: int) -> None:
        """Meets a program with command lines that have a flag, or any.

        Raises:
          ViolationError: with the shortest command line found to which a program is not up.
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
        def meets(arguments: list[str]) -> None:
            outcome = meet(program, arguments)
            self.counts[program.script][outcome.kind] += 1
            if outcome.kind == "refused":
                self.refused.append((program, arguments))

        with working_folder(self._empty):
            meets()

    @property
    def cases(self) -> int:
        """How many command lines were met."""
        return sum(sum(counts.values()) for counts in self.counts.values())

    def as_processes(self, count: int) -> None:
        """Runs some of what was refused as processes, evenly drawn from all of it.

        Raises:
          ViolationError: as `meet`.
        """
        step = max(1, len(self.refused) // count)
        for program, arguments in self.refused[::step][:count]:
            code, said = run_process(program.script, arguments, self._empty)
            check_refusal(program, arguments, code, said)
            if any(self._empty.iterdir()):
                raise ViolationError(f"{program.script} {arguments!r} left something on disk")


def main() -> None:
    """Draws, counts and writes the figures; ends with 1 where a program was not up to a case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        trial = Trial(Path(name), derandomize=False)
        number_of_flags = sum(len(program.flags) for program in PROGRAMS)
        try:
            trial.every_flag(-(-arguments.cases // number_of_flags))
            for program in PROGRAMS:
                trial.draw(program, None, 50)
            trial.as_processes(PROCESSES)
        except ViolationError as error:
            print(error, file=sys.stderr)
            sys.exit(1)
    for script, counts in trial.counts.items():
        print(f"{script:<16}", dict(counts))
    print(f"{trial.cases} command lines, {PROCESSES} of them as processes too; 0 violations")
    result = {
        "command_lines": trial.cases,
        "flags": number_of_flags,
        "as_processes_too": PROCESSES,
        "violations": 0,
        "outcomes": {script: dict(counts) for script, counts in trial.counts.items()},
    }
    print(f"written to {write_result('bad_flags', result)}")


if __name__ == "__main__":
    main()
