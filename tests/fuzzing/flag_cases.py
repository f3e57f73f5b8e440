"""Valid and invalid command lines, drawn by Hypothesis from the config classes."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from hypothesis import strategies as st

from research.settings.fields import setting_of, value_type
from research.settings.program_configs import EvalConfig, ExportConfig, PredictConfig
from research.settings.train_config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Program:
    """A script, its config class, and whether paths may follow its flags."""

    script: str
    config_class: type
    takes_paths: bool = False

    @property
    def flags(self) -> list[str]:
        """Names of its flags."""
        return [field.name for field in dataclasses.fields(self.config_class)]


PROGRAMS = (
    Program("run_train.py", TrainConfig),
    Program("run_eval.py", EvalConfig),
    Program("run_predict.py", PredictConfig, takes_paths=True),
    Program("run_export.py", ExportConfig),
)

NUMBERS = (
    *("nan", "-nan", "inf", "-inf", "infinity", "1e999", "-1e999", "1e308", "1e-320"),
    *("-0", "-0.0", "0", "-1", "1", "1.5", "1e3", "1e", "0.1.2"),
    *("2147483647", "2147483648", "4294967296", "0x10", "0b1", "0o7", "1_000", "1,000"),
    *("+5", "--5", "5;", "5px", ".", "-", "½", "²", "true", "None", "null", "[]", "{}"),
    *("\u0663", "\uff11\uff12"),  # digits of other scripts
    *(" 5", "5 ", "9" * 400, "9" * 5000, "0x" + "f" * 5000),
)
TEXTS = (
    *("", " ", "\t", "\n", "a\nb", "\r", "\x1b[31mred", "\x07", "\x7f", "\u202eabc", "\u2028"),
    *("\ud83d", "\udcff", "\udc80\udc81", "x" * 5000, "/" * 300, "../" * 50, "a b", "a\u0300"),
    *("~", "~nobody/x", "$HOME", "*", "%s", "{0}", "猫", "🐈", "'", '"', "\\", "`id`"),
    *("-", "--", "---", "=", "a=b", ",", "none", "None", "imagenet", "latest", "best"),
    *("train", "test", "train[:10%]", "3:5", "5:3", "1epoch", "-1epoch", "1e9epochs"),
    *("100steps", "0.5steps", "block5", "gs://a/b", "ns:name/x=1"),
)
SWITCHES = (
    *("true", "false", "1", "0", "yes", "no", "TRUE", "2", "maybe", "", "t"),
    "\uff54\uff52\uff55\uff45",
)
ABSL_FLAGS = (
    *("verbosity", "stderrthreshold", "logger_levels", "log_dir", "undefok", "flagfile"),
    *("alsologtostderr", "logtostderr", "showprefixforinfo", "pdb_post_mortem", "fromenv"),
)


def odd_text() -> st.SearchStrategy[str]:
    """Texts that can be a process argument: without NUL, some of them not valid UTF-8."""
    letters = st.characters(min_codepoint=1, exclude_categories=["Cs"])
    any_bytes = st.binary(max_size=20).map(
        lambda data: data.replace(b"\0", b"").decode("utf-8", "surrogateescape")
    )
    return st.one_of(st.sampled_from(TEXTS).filter(_can_be_argument), st.text(letters), any_bytes)


def _can_be_argument(text: str) -> bool:
    try:
        return "\0" not in text and bool(os.fsencode(text) or True)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def values_of(config_class: type, name: str) -> st.SearchStrategy[str]:
    """Values for a flag: values of its type at the limits of its range, and all other types."""
    field = next(one for one in dataclasses.fields(config_class) if one.name == name)
    setting = setting_of(field)
    kind, _ = value_type(config_class, name)
    numbers = st.one_of(st.sampled_from(NUMBERS), st.integers().map(str), st.floats().map(repr))
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
    """A flag in one of the valid or invalid notations."""
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
    """An argument other than a program's flags: an unknown flag, absl's, a flagfile, a word."""
    text = draw(odd_text())
    name = draw(st.sampled_from(ABSL_FLAGS))
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
def command_lines(draw: st.DrawFn, program: Program, name: str | None, folder: Path) -> list[str]:
    """Arguments with the named flag, alone or among others; any arguments if `name` is None."""
    arguments = draw(given_flag(program, name)) if name else []
    if "ckpt_dir" in program.flags and program.config_class is not TrainConfig:
        arguments = draw(st.sampled_from([["--ckpt_dir=run"], ["--ckpt_dir=run"], []])) + arguments
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2, 3] if name else [1, 2, 3]))):
        other = draw(st.sampled_from(program.flags))
        more = draw(st.one_of(given_flag(program, other), other_argument(folder)))
        arguments = draw(st.sampled_from([arguments + more, more + arguments]))
    return arguments


def write_flagfiles(folder: Path) -> None:
    """Writes valid flagfiles, and invalid flagfiles of many kinds, into a new folder."""
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
