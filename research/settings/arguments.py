"""The command line of a program inside the library: a config class's fields as arguments.

The programs at the top level have their flags from `flags/`, which the library does not know.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

from research.settings.fields import setting_of, value_type
from research.system.program import fail

Config = TypeVar("Config")


def parse_arguments(
    config_class: type[Config], program: str, description: str, arguments: Sequence[str]
) -> Config:
    """Returns the config that a command line means.

    Wrong arguments end the process with a line and exit code 2, `--help` with exit code 0.

    Args:
      config_class: a dataclass of texts and whole numbers, each declared as a setting.
      program: how it is called, for `--help`.
      description: what it does, for `--help`.
      arguments: the command line without the program.

    Raises:
      UserError: a value is out of its range.
    """
    parser = _Parser(
        prog=program,
        description=description,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=80),
    )
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        kind, _ = value_type(config_class, field.name)
        default = "" if field.default is None else f" (default: {field.default})"
        parser.add_argument(
            f"--{field.name}",
            type=PARSERS[kind],
            default=field.default,
            metavar="N" if kind is int else "TEXT",
            help=setting_of(field).help.replace("%", "%%") + default,
        )
    values, others = parser.parse_known_args(arguments)
    for other in others:
        _refuse(other, list(vars(values)))
    return config_class(**vars(values))


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} given; expected a whole number") from None


PARSERS: dict[type, Any] = {int: _whole_number, str: str}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(f"{message}; see --help")


def _refuse(argument: str, names: Sequence[str]) -> NoReturn:
    if not argument.startswith("-"):
        fail(f"{argument!r} is no flag; flags are written --name=value, see --help")
    name = argument.lstrip("-").partition("=")[0]
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean --{nearest[0]}?" if nearest else "see --help"
    fail(f"unknown flag --{name}; {hint}")
