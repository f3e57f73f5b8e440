"""Runs a script: flags to config, config to one call, mistakes to one line."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from absl import app, flags, logging

from research.settings.fields import setting_of, value_type
from research.system.program import ended_by_a_line, fail

Config = TypeVar("Config")


class _WholeNumber(flags.IntegerParser):
    def convert(self, argument: int | str) -> int:
        try:
            return super().convert(argument)
        except ValueError:
            raise ValueError("expected a whole number") from None


class _Number(flags.FloatParser):
    def convert(self, argument: float | str) -> float:
        try:
            return super().convert(argument)
        except ValueError:
            raise ValueError("expected a number") from None


class _Switch(flags.BooleanParser):
    def parse(self, argument: str | int) -> bool:
        try:
            return super().parse(argument)
        except ValueError:
            raise ValueError("expected true or false") from None


PARSERS: dict[type, Any] = {int: _WholeNumber(), float: _Number(), str: flags.ArgumentParser()}


def define_flags(config_class: type, values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Declares one flag for each field of a config class, for `--help` too; returns their names."""
    names = []
    for field in dataclasses.fields(config_class):
        setting = setting_of(field)
        kind, _ = value_type(config_class, field.name)
        names.append(field.name)
        if kind is tuple:
            default: Any = field.default or None
            flags.DEFINE_multi_string(
                field.name, default, setting.help, values, module_name=sys.argv[0]
            )
            continue
        if kind is bool:
            boolean = flags.BooleanFlag(field.name, bool(field.default), setting.help)
            boolean.parser = _Switch()
            flags.DEFINE_flag(boolean, values, module_name=sys.argv[0])
            continue
        words = list(setting.choices)
        # What a file of the user's own may stand in for is checked by the config class.
        is_enum = words and not setting.or_python_file
        parser = flags.EnumParser(words) if is_enum else PARSERS[kind]
        choices = f"<{'|'.join(setting.values.split(', '))}>: " if words else ""
        flags.DEFINE(
            parser,
            field.name,
            field.default,
            f"{choices}{setting.help}",
            values,
            flags.ArgumentSerializer(),
            module_name=sys.argv[0],
        )
    return names


def parse_config(config_class: type[Config], arguments: list[str]) -> Config:
    """Returns the config that some flags mean; raises absl's `flags.Error` for wrong ones."""
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
        fail(f"a flagfile is no text in UTF-8 ({error.reason}); expected one flag a line")
    except (flags.Error, ValueError) as error:  # absl's own flags raise the latter
        fail(str(error))
    except SystemExit:  # only `--help` and its kin end here; asking for help is no error
        sys.exit(0)
    if warnings.getvalue():  # of a flagfile that reads itself, which absl would leave out
        fail(warnings.getvalue())
    if remaining[1:] and not takes_paths:
        fail(f"{remaining[1]!r} is no flag; flags are written --name=value, see --help")
    return list(remaining)


def run(config_class: type[Config], main: Callable[[Config], None]) -> None:
    """Parses the command line into a config and calls `main` with it; does not return."""
    run_with_paths(config_class, lambda config, _: main(config), takes_paths=False)


def run_with_paths(
    config_class: type[Config],
    main: Callable[[Config, list[str]], None],
    takes_paths: bool = True,
) -> None:
    """Like `run`, and gives `main` what stands after the flags."""

    def run_main(arguments: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.ERROR)  # TFDS and TensorFlow tell of every step they take
        with ended_by_a_line():
            main(config_class(**{name: flags.FLAGS[name].value for name in names}), arguments[1:])

    names = define_flags(config_class)
    app.run(run_main, flags_parser=functools.partial(_parse, takes_paths=takes_paths))
