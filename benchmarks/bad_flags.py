"""Gives every flag of every program what a person, or a slip of the hand, could give it.

python -m benchmarks.bad_flags --cases=2000     # about 4 minutes on two cores

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
from hypothesis import strategies as st

from benchmarks.record import write_result
from flags.command_line import run_with_paths
from research.commands import EvalConfig, ExportConfig, PredictConfig
from research.config import TrainConfig
from research.printable import printable
from research.settings import setting_of, value_type

ROOT = Path(__file__).resolve().parents[1]
PROCESSES = 40


@dataclasses.dataclass(frozen=True)
class Program:
    """A script, the class of its settings, and whether paths may follow its flags."""

    script: str
    config_class: type
    takes_paths: bool = False

    @property
    def flags(self) -> list[str]:
        """The names of its flags."""
        return [field.name for field in dataclasses.fields(self.config_class)]


PROGRAMS = (
    Program("run_train.py", TrainConfig),
    Program("run_eval.py", EvalConfig),
    Program("run_predict.py", PredictConfig, takes_paths=True),
    Program("run_export.py", ExportConfig),
)

NUMBERS = (
    *("nan", "-nan", "inf", "-inf", "infinity", "1e999", "-1e999", "1e308", "1e-320", "-0", "-0.0"),
    *("0", "-1", "1", "1.5", "1e3", "2147483647", "2147483648", "4294967296", "9" * 400, "9" * 5000),
    *("0x10", "0x" + "f" * 5000, "0b1", "0o7", "1_000", "1,000", "+5", " 5", "5 ", "--5", "٣", "１２"),
    *("5;", "5px", "1e", ".", "-", "½", "²", "1e400", "0.1.2", "true", "None", "null", "[]", "{}"),
)
TEXTS = (
    *("", " ", "\t", "\n", "a\nb", "\r", "\x1b[31mred", "\x07", "\x7f", "\u202eabc", "\u2028", "\ud83d"),
    *("\udcff", "\udc80\udc81", "x" * 5000, "/" * 300, "../" * 50, "~", "~nobody/x", "$HOME", "*", "%s"),
    *("{0}", "a b", "猫", "a\u0300", "🐈", "'", '"', "\\", "`id`", "-", "--", "---", "=", "a=b", ","),
    *("none", "None", "imagenet", "latest", "best", "train", "test", "train[:10%]", "3:5", "5:3"),
    *("1epoch", "-1epoch", "1e9epochs", "100steps", "0.5steps", "block5", "gs://a/b", "ns:name/x=1"),
)
SWITCHES = ("true", "false", "1", "0", "yes", "no", "TRUE", "2", "maybe", "", "t", "ｔｒｕｅ")
OF_ABSL = (
    *("verbosity", "stderrthreshold", "logger_levels", "log_dir", "undefok", "flagfile"),
    *("alsologtostderr", "logtostderr", "showprefixforinfo", "pdb_post_mortem", "fromenv"),
)


class ViolationError(AssertionError):
    """A program met a command line neither with a line nor with settings."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command line was met: `refused` with a line, `taken` with settings, or `help`."""

    kind: str
    line: str = ""


def odd_text() -> st.SearchStrategy[str]:
    """Texts that can be an argument of a process: no NUL, bytes that are no UTF-8 among them."""
    letters = st.characters(min_codepoint=1, exclude_categories=("Cs",))
    bytes_of_no_text = st.binary(max_size=20).map(
        lambda data: data.replace(b"\0", b"").decode("utf-8", "surrogateescape")
    )
    return st.one_of(
        st.sampled_from(TEXTS).filter(_can_be_argument), st.text(letters), bytes_of_no_text
    )


def _can_be_argument(text: str) -> bool:
    try:
        return "\0" not in text and bool(os.fsencode(text) or True)
    except UnicodeEncodeError:  # half of a pair of surrogates
        return False


def values_of(config_class: type, name: str) -> st.SearchStrategy[str]:
    """Values for one flag: its own kind at the edges of its range, and all other kinds."""
    field = next(one for one in dataclasses.fields(config_class) if one.name == name)
    setting = setting_of(field)
    kind, _ = value_type(config_class, name)
    numbers = st.one_of(
        st.sampled_from(NUMBERS),
        st.integers().map(str),
        st.floats().map(repr),
    )
    switches = st.sampled_from(SWITCHES)
    if setting.choices:
        own = st.sampled_from(setting.choices)
    elif kind is bool:
        own = switches
    elif kind in (int, float):
        low = setting.minimum or 0
        edges = [low, low - 1, low + 1, setting.maximum, setting.maximum + 1, setting.maximum - 1]
        own = st.sampled_from([*(f"{edge:.17g}" for edge in edges), *map(str, edges)])
    else:
        own = st.sampled_from([str(field.default), "a", "sketches", "SmallResNet", "100"])
    return st.one_of(own, numbers, odd_text(), switches)


@st.composite
def given_flag(draw: st.DrawFn, program: Program, name: str) -> list[str]:
    """One flag in one of the ways of writing it, right or wrong."""
    value = draw(values_of(program.config_class, name))
    form = draw(st.integers(0, 9))
    forms = {
        0: [f"--{name}", value],
        1: [f"-{name}={value}"],
        2: [f"--no{name}"],
        3: [f"--{name}"],
        4: [f"--{name}=", value],
    }
    return forms.get(form, [f"--{name}={value}"])


@st.composite
def other_argument(draw: st.DrawFn, folder: Path) -> list[str]:
    """What is no flag of a program: a wrong name, one of absl's own flags, a flagfile, a word."""
    text = draw(odd_text())
    name = draw(st.sampled_from(OF_ABSL))
    flagfiles = sorted(file.name for file in folder.iterdir())
    flagfile = folder / draw(st.sampled_from([*flagfiles, "missing.flags"]))
    form = draw(st.integers(0, 4))
    return {
        0: [f"--{draw(st.sampled_from(('epoch', 'hel', 'batchsize', 'x', 'no', '')))}={text}"],
        1: [f"--{name}={text if name != 'log_dir' else 'nowhere'}"],
        2: [f"--flagfile={flagfile}"],
        3: [text],
        4: [f"--{text}"],
    }[form]


@st.composite
def command_lines(
    draw: st.DrawFn, program: Program, name: str | None, folder: Path
) -> list[str]:
    """Arguments that have the flag named, alone or among others; without a name any."""
    arguments = draw(given_flag(program, name)) if name else []
    if "ckpt_dir" in program.flags and program.config_class is not TrainConfig:
        arguments = draw(st.sampled_from([["--ckpt_dir=run"], ["--ckpt_dir=run"], []])) + arguments
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2, 3] if name else [1, 2, 3]))):
        other = draw(st.sampled_from(program.flags))
        more = draw(st.one_of(given_flag(program, other), other_argument(folder)))
        arguments = draw(st.sampled_from([arguments + more, more + arguments]))
    return arguments


def write_flagfiles(folder: Path) -> None:
    """Writes flagfiles into a folder: right ones, and all kinds of wrong ones."""
    folder.mkdir(parents=True)
    (folder / "good.flags").write_text("--image_size=64\n# a comment\n\n--ckpt_dir=run\n")
    (folder / "unknown.flags").write_text("--no_such_flag=1\n")
    (folder / "recursive.flags").write_text(f"--flagfile={folder / 'recursive.flags'}\n")
    for one, other in (("ping", "pong"), ("pong", "ping")):
        (folder / f"{one}.flags").write_text(f"--flagfile={folder / other}.flags\n--image_size=0\n")
    (folder / "binary.flags").write_bytes(bytes(range(256)) * 20)
    (folder / "latin.flags").write_bytes(b"--ckpt_dir=caf\xe9\n")
    (folder / "empty.flags").write_text("")
    (folder / "words.flags").write_text("epochs 3\n")
    (folder / "long.flags").write_text("--image_size=32\n" * 5000)
    (folder / "folder.flags").mkdir()
    (folder / "link.flags").symlink_to(folder / "nowhere")


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


def check_refusal(
    program: Program, arguments: Sequence[str], code: object, said: str
) -> None:
    """Raises `ViolationError` unless a program ended with one line that a terminal can show."""
    (line, *others) = said.splitlines() or [""]
    right = line.startswith(f"{program.script}: ") and not others and said.endswith("\n")
    if code in (None, 0) or not right or printable(line) != line:
        raise ViolationError(f"{program.script} {arguments!r} ended with {code!r} and said {said!r}")


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
