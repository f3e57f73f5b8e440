"""Runs a program: parses its flags into a config, calls `main`, reports an error in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from absl import app, flags, logging

from research.settings.fields import AUTO, setting_of, value_type
from research.system.program import ended_by_a_line, fail
from research.system.standard_streams import safe_streams

Config = TypeVar("Config")


PARSERS: dict[type, tuple[Any, str]] = {
    int: (flags.IntegerParser, "an integer"),
    float: (flags.FloatParser, "a number"),
    bool: (flags.BooleanParser, "true or false"),
    str: (flags.ArgumentParser, "text"),
    tuple: (flags.ArgumentParser, "text"),  # parses each value of a repeated flag
}


def _parser(kind: type, automatic: bool) -> Any:
    """Returns an absl parser whose error message says which kind of value was expected."""
    base, expected = PARSERS[kind]

    class Parser(base):  # type: ignore[misc, valid-type]
        def parse(self, argument: Any) -> Any:
            if automatic and argument == AUTO:
                return AUTO
            try:
                return super().parse(argument)
            except ValueError:
                wanted = f"{expected}, or {AUTO}" if automatic else expected
                raise ValueError(f"expected {wanted}") from None

    parser = Parser()
    if automatic and parser.syntactic_help:
        parser.syntactic_help += f", or {AUTO}"
    return parser


def define_flags(config_class: type, values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Defines one flag for each field of a config class. Returns the names of the flags."""
    fields = dataclasses.fields(config_class)
    for field in fields:
        setting = setting_of(field)
        kind, _ = value_type(config_class, field.name)
        help_text, default = setting.help, field.default
        automatic = setting.fallback is not None
        parser = _parser(kind, automatic)
        if setting.choices:
            help_text = f"<{'|'.join(setting.values.split(', '))}>: {help_text}"
            if not setting.or_python_file:  # the config class checks FILE.py:NAME
                parser = flags.EnumParser(list(setting.choices))
        flag_type: Any = flags.Flag
        if kind is tuple:
            flag_type, default = flags.MultiFlag, default or None
        serializer: Any = flags.ArgumentSerializer() if automatic or kind is not bool else None
        flag = flag_type(parser, serializer, field.name, default, help_text, boolean=kind is bool)
        flags.DEFINE_flag(flag, values, module_name=sys.argv[0])
    return [field.name for field in fields]


def parse_config(config_class: type[Config], arguments: list[str]) -> Config:
    """Returns the config that some flags describe. Raises absl's `flags.Error` for a wrong flag."""
    values = flags.FlagValues()
    names = define_flags(config_class, values)
    values([sys.argv[0], *arguments])
    return config_class(**{name: values[name].value for name in names})


def _parse(arguments: list[str], takes_paths: bool) -> list[str]:
    warnings = io.StringIO()
    try:
        with contextlib.redirect_stderr(warnings):
            remaining = flags.FLAGS(arguments)
    except UnicodeDecodeError as error:
        fail(f"a flagfile is not UTF-8 text ({error.reason}); expected one flag per line")
    except (flags.Error, ValueError) as error:  # absl's own flags raise ValueError
        dashed = f"-{error.flagname}" if isinstance(error, flags.UnrecognizedFlagError) else ""
        is_file = takes_paths and os.path.exists(dashed)
        fail(f"{error}; for the file of this name, write ./{dashed}" if is_file else str(error))
    except SystemExit:  # raised by --help and similar flags only, which are not an error
        sys.exit(0)
    if warnings.getvalue():  # a flagfile includes itself; absl would ignore it
        fail(warnings.getvalue())
    if remaining[1:] and remaining[1].startswith("\ufeff"):
        fail("a flagfile begins with a byte-order mark; save it as UTF-8 without this mark")
    if remaining[1:] and not takes_paths:
        fail(f"{remaining[1]!r} is not a flag; write flags as --name=value, see --help")
    return list(remaining)


def run(
    config_class: type,
    main: Callable[..., None],
    takes_paths: bool = False,
    stop_at_output_error: bool = False,
) -> None:
    """Parses the command line, calls `main`, and ends the process.

    Args:
      config_class: the config class whose fields are the flags.
      main: is called with the config. With `takes_paths`, the list of the arguments after the flags
        is its second argument.
      takes_paths: whether arguments after the flags are allowed.
      stop_at_output_error: whether the program ends if standard output cannot be written. All
        others continue, and their exit code is 1 instead of 0.
    """

    def run_main(arguments: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.ERROR)  # TFDS and TensorFlow log each of their steps
        with ended_by_a_line():
            config = config_class(**{name: flags.FLAGS[name].value for name in names})
            main(config, *([arguments[1:]] if takes_paths else []))

    names = define_flags(config_class)
    with safe_streams(stop_at_output_error):
        app.run(run_main, flags_parser=functools.partial(_parse, takes_paths=takes_paths))
