"""Declares settings: default, help text and range in one place, checked when a config is built.

This module must not import TensorFlow, so that `--help` and flag errors appear at once.
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

AUTO: Any = "auto"


@dataclasses.dataclass(frozen=True)
class Setting:
    """The description of a setting. Its name, type and default are those of the config field.

    Attributes:
      help: one or two sentences for `--help`.
      choices: the allowed values; None if they cannot be listed.
      minimum: the smallest allowed number.
      exclusive: whether the number must be greater than `minimum`.
      maximum: the largest allowed number.
      is_path: whether the value is a path, which is made absolute.
      or_python_file: whether the value may be FILE.py:NAME, what a file of the user defines.
        The path is made absolute.
      changes_result: whether the setting influences the result of a run. A run is not resumed with
        a different value of such a setting.
      fallback: the value of `AUTO` if the photos tell nothing; None if `AUTO` is not allowed. The
        rules in `automatic.py` choose the value from the photos.
    """

    help: str
    choices: tuple[str, ...] | None = None
    minimum: float | None = None
    exclusive: bool = False
    maximum: float = 2**31 - 1
    is_path: bool = False
    or_python_file: bool = False
    changes_result: bool = True
    fallback: Any = None

    @property
    def values(self) -> str:
        """The allowed values for messages and `--help`."""
        return ", ".join((*(self.choices or ()), *(["FILE.py:NAME"] * self.or_python_file)))


def setting_of(field: dataclasses.Field[Any]) -> Setting:
    """Returns the `Setting` of a config field."""
    return typing.cast(Setting, field.metadata["setting"])


def declare(default: Any, help: str, **options: Any) -> Any:
    """Declares a field of a config class. `options` are further attributes of `Setting`.

    The type of the value is that of the field: bool, int, float, str, or tuple[str, ...]. A flag
    for a tuple may be given several times.
    """
    return dataclasses.field(default=default, metadata={"setting": Setting(help, **options)})


def count(default: int | None, help: str, *, minimum: int = 0, **options: Any) -> Any:
    """Declares an integer of at least `minimum`."""
    return declare(default, help, minimum=minimum, **options)


def rate(default: float | None, help: str, **options: Any) -> Any:
    """Declares a number greater than 0."""
    return declare(default, help, minimum=0.0, exclusive=True, **options)


def strength(default: float | None, help: str, **options: Any) -> Any:
    """Declares a number of at least 0. The value 0 turns the setting off."""
    return declare(default, help, minimum=0.0, **options)


def choice(default: str, choices: tuple[str, ...], help: str, **options: Any) -> Any:
    """Declares one of several words."""
    return declare(default, help, choices=choices, **options)


def python_file(help: str, **options: Any) -> Any:
    """Declares a class in a file of the user, as FILE.py:CLASS; the default is None."""
    return declare(None, help, choices=(), or_python_file=True, **options)


def path(help: str, **options: Any) -> Any:
    """Declares a file or folder; the default is None."""
    return declare(None, help, is_path=True, **options)


@functools.cache
def _type_hints(config_class: type) -> dict[str, Any]:
    return typing.get_type_hints(config_class)


def value_type(config_class: type, name: str) -> tuple[type, bool]:
    """Returns the type of a field, and whether None is allowed.

    The type is int, float, str, bool, or tuple for a tuple of strings.
    """
    hint = _type_hints(config_class)[name]
    if typing.get_origin(hint) is tuple:
        return tuple, False
    types = typing.get_args(hint) or (hint,)
    return next(t for t in types if t is not type(None)), type(None) in types


def _check_value(config_class: type, field: dataclasses.Field[Any], value: Any) -> Any:
    """Returns the value in its canonical form. Raises `UserError` if it is not allowed."""
    kind, optional = value_type(config_class, field.name)
    setting = setting_of(field)
    if (value is None and optional) or (value == AUTO and setting.fallback is not None):
        return value
    if kind is tuple:
        texts = () if value is None else (value,) if isinstance(value, str) else value
        if not isinstance(texts, (tuple, list)) or not all(isinstance(one, str) for one in texts):
            raise UserError(f"{field.name} is {value!r}; expected a list of texts")
        return tuple(_check_range(field.name, setting, str, text) for text in texts)
    if kind is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            value = math.inf if value > 0 else -math.inf
    if type(value) is not kind:
        auto = f", or {AUTO}" if setting.fallback is not None else ""
        raise UserError(
            f"{field.name} is {value!r}; expected a value of type {kind.__name__}{auto}"
        )
    return _check_range(field.name, setting, kind, value)


def _check_range(name: str, setting: Setting, kind: type, value: Any) -> Any:
    if setting.or_python_file and is_python_reference(value):
        file, _, defined = value.rpartition(":")
        value = f"{_absolute(name, file)}:{defined}"
    elif setting.choices is not None and value not in setting.choices:
        raise UserError(f"{name} is {value!r}; expected one of: {setting.values}")
    if setting.minimum is not None:
        noun = "an integer" if kind is int else "a number"
        low = value <= setting.minimum if setting.exclusive else value < setting.minimum
        # Python refuses to write an integer of thousands of digits in decimal.
        shown = hex(value) if kind is int and abs(value) > 10**400 else value
        if value > setting.maximum:
            raise UserError(f"{name} is {shown}; expected {noun} of at most {setting.maximum}")
        if low or math.isnan(value):
            bound = "greater than" if setting.exclusive else "of at least"
            raise UserError(f"{name} is {shown}; expected {noun} {bound} {setting.minimum:g}")
    if kind is str and (not value or not value.isprintable()):
        raise UserError(f"{name} is {value!r}; expected non-empty text of printable characters")
    return _absolute(name, value) if setting.is_path else value


def _absolute(name: str, path: str) -> str:
    """Returns an absolute path; `~` stands for the home folder."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(
            f"{name} is {path!r}, and the home folder is not known; set HOME, or give a whole path"
        )
    try:
        return os.path.abspath(expanded)
    except FileNotFoundError as error:
        raise UserError(
            f"{name} is {path!r}, and the working directory no longer exists; change to another"
        ) from error


class Validated:
    """Base class of the configs. Checks each field when a config is built."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(typing.cast(Any, self)):
            checked = _check_value(type(self), field, getattr(self, field.name))
            object.__setattr__(self, field.name, checked)
