"""How a setting is declared: default, help text and range in one place, checked when it is set.

This module must stay free of TensorFlow: `--help` and flag errors answer at once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import typing
from typing import Any

from research.system.errors import UserError
from research.system.python_file import is_python_reference


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is known of one setting besides its name, type and default.

    Attributes:
      help: one or two sentences for `--help`.
      choices: the values allowed, where they can be listed.
      minimum: the least number allowed, inclusive unless `exclusive`.
      exclusive: the number must be greater than `minimum`, not equal to it.
      maximum: the greatest number allowed.
      is_path: the value is a path, kept in its absolute form.
      or_python_file: beside `choices`, the value may be FILE.py:NAME, a class or function of the
        user's own; kept with the absolute path.
      changes_result: a run resumed with another value would not be the same run.
    """

    help: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    exclusive: bool = False
    maximum: float = 2**31 - 1
    is_path: bool = False
    or_python_file: bool = False
    changes_result: bool = True

    @property
    def values(self) -> str:
        """What may be given, for messages and `--help`; empty where the type says it."""
        return ", ".join((*self.choices, *(["FILE.py:NAME"] if self.or_python_file else [])))


def setting_of(field: dataclasses.Field[Any]) -> Setting:
    """Returns the `Setting` that a config field carries."""
    return typing.cast(Setting, field.metadata["setting"])


def declare(default: Any, setting: Setting) -> Any:
    """Declares a field of a config class."""
    return dataclasses.field(default=default, metadata={"setting": setting})


def count(
    default: int | None,
    help: str,
    *,
    minimum: int = 0,
    maximum: int = 2**31 - 1,
    changes_result: bool = True,
) -> Any:
    """Declares a whole number of at least `minimum`; None for none or all."""
    setting = Setting(help, minimum=minimum, maximum=maximum, changes_result=changes_result)
    return declare(default, setting)


def rate(default: float | None, help: str, *, maximum: float = 2**31 - 1) -> Any:
    """Declares a number greater than 0."""
    return declare(default, Setting(help, minimum=0.0, exclusive=True, maximum=maximum))


def strength(default: float | None, help: str, *, maximum: float = 2**31 - 1) -> Any:
    """Declares a number of at least 0; 0 or None to leave it."""
    return declare(default, Setting(help, minimum=0.0, maximum=maximum))


def choice(
    default: str,
    choices: tuple[str, ...],
    help: str,
    *,
    or_python_file: bool = False,
    changes_result: bool = True,
) -> Any:
    """Declares one of some words; or else a class or function in the user's own file."""
    setting = Setting(
        help, choices=choices, or_python_file=or_python_file, changes_result=changes_result
    )
    return declare(default, setting)


def python_file(help: str, *, changes_result: bool = True) -> Any:
    """Declares a class in the user's own file, as FILE.py:CLASS; None for none."""
    return declare(None, Setting(help, or_python_file=True, changes_result=changes_result))


def path(help: str, *, changes_result: bool = True) -> Any:
    """Declares a file or folder, kept in its absolute form."""
    return declare(None, Setting(help, is_path=True, changes_result=changes_result))


def text(default: str | None, help: str, *, changes_result: bool = True) -> Any:
    """Declares any text that can be printed."""
    return declare(default, Setting(help, changes_result=changes_result))


def several(
    default: tuple[str, ...], help: str, *, is_path: bool = False, or_python_file: bool = False
) -> Any:
    """Declares texts, paths or files; on the command line the flag is given several times."""
    return declare(default, Setting(help, is_path=is_path, or_python_file=or_python_file))


def switch(default: bool, help: str, *, changes_result: bool = True) -> Any:
    """Declares true or false."""
    return declare(default, Setting(help, changes_result=changes_result))


@functools.cache
def _type_hints(config_class: type) -> dict[str, Any]:
    return typing.get_type_hints(config_class)


def value_type(config_class: type, name: str) -> tuple[type, bool]:
    """Returns the type of a field's value, and if None is allowed.

    It is int, float, str, bool, or tuple for a tuple of texts.
    """
    hint = _type_hints(config_class)[name]
    if typing.get_origin(hint) is tuple:
        return tuple, False
    types = typing.get_args(hint) or (hint,)
    return next(t for t in types if t is not type(None)), type(None) in types


def _check_value(config_class: type, field: dataclasses.Field[Any], value: Any) -> Any:
    """Returns the value in its canonical form; raises `UserError` for one that is not allowed."""
    kind, optional = value_type(config_class, field.name)
    if value is None and optional:
        return None
    if kind is tuple:
        setting = setting_of(field)
        return tuple(_check_range(field.name, setting, str, text) for text in value or ())
    if kind is float and type(value) is int:
        value = _as_float(value)
    if type(value) is not kind:
        raise UserError(f"{field.name} is {value!r}; expected a value of type {kind.__name__}")
    return _check_range(field.name, setting_of(field), kind, value)


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _check_range(name: str, setting: Setting, kind: type, value: Any) -> Any:
    if setting.or_python_file and is_python_reference(value):
        file, _, defined = value.rpartition(":")
        value = f"{os.path.abspath(os.path.expanduser(file))}:{defined}"
    elif setting.values and value not in setting.choices:
        raise UserError(f"{name} is {value!r}; expected one of: {setting.values}")
    if setting.minimum is not None:
        noun = "a whole number" if kind is int else "a number"
        low = value <= setting.minimum if setting.exclusive else value < setting.minimum
        # Python refuses to write integers of thousands of digits in decimal.
        shown = hex(value) if kind is int and abs(value) > 10**400 else value
        if value > setting.maximum:
            raise UserError(f"{name} is {shown}; expected {noun} of at most {setting.maximum}")
        if low or math.isnan(value):
            bound = "greater than" if setting.exclusive else "of at least"
            raise UserError(f"{name} is {shown}; expected {noun} {bound} {setting.minimum:g}")
    if kind is str and (not value or not value.isprintable()):
        raise UserError(f"{name} is {value!r}; expected text that can be printed")
    return os.path.abspath(os.path.expanduser(value)) if setting.is_path else value


class Validated:
    """Checks each field when a config is built, so that no other code has to."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(typing.cast(Any, self)):
            checked = _check_value(type(self), field, getattr(self, field.name))
            object.__setattr__(self, field.name, checked)
