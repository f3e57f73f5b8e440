"""Loads a class, function or object from a user's Python file, given as FILE.py:NAME."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any, TypeVar

from research.system.errors import UserError, one_line

Object = TypeVar("Object")
MODULE_PREFIX = "user_file_"


def is_python_reference(text: str) -> bool:
    """Returns whether a text has the form FILE.py:NAME."""
    file, _, name = text.rpartition(":")
    return file.endswith(".py") and name.isidentifier()


def load_from_file(setting: str, reference: str, base: type | None = None) -> Any:
    """Imports a Python file and returns a class or function that it defines.

    Args:
      setting: the setting that contains the reference, for error messages.
      reference: FILE.py:NAME.
      base: the required base class; None accepts any callable.

    Raises:
      UserError: there is no such file or name, the import fails, or the object has another type.
    """
    name, found = _find(setting, reference)
    if base is not None and not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(
            f"{setting} is {reference!r}, but {name} is not a subclass of "
            f"{base.__module__}.{base.__name__}"
        )
    if not callable(found):
        raise UserError(f"{setting} is {reference!r}, but {name} is not a class or function")
    if base is not None:
        _note_unknown_methods(found, base)
    return found


def _note_unknown_methods(kind: type, base: type) -> None:
    own = [key for key in vars(kind) if not key.startswith("_") and callable(vars(kind)[key])]
    unknown = [key for key in own if not hasattr(base, key)]
    if unknown:
        name = kind.__name__
        note = f"note: {name} defines {', '.join(unknown)}, which {base.__name__} does not have"
        print(f"{note}; begin the names of your own methods with _", file=sys.stderr, flush=True)


def construct_from_file(setting: str, reference: str, base: type | None = None) -> Any:
    """Returns what a class or function in a Python file gives if it is called without arguments.

    Args:
      setting, reference, base: see `load_from_file`.

    Raises:
      UserError: see `load_from_file`; or the call fails.
    """
    kind = load_from_file(setting, reference, base)
    with failures_in_one_line(setting, reference, "call without arguments failed"):
        return kind()


def load_object_from_file(setting: str, reference: str, kind: type[Object]) -> Object:
    """Imports a Python file and returns an object of a class that it defines.

    Args:
      setting, reference: see `load_from_file`.
      kind: the class of the object.

    Raises:
      UserError: there is no such file or name, the import fails, or the object has another type.
    """
    name, found = _find(setting, reference)
    if not isinstance(found, kind):
        is_class = "a class" if isinstance(found, type) else f"of type {type(found).__name__}"
        raise UserError(
            f"{setting} is {reference!r}, but {name} is {is_class}; expected an object of the "
            f"class {kind.__module__}.{kind.__name__}"
        )
    return found


@contextlib.contextmanager
def failures_in_one_line(setting: str, value: str, what: str) -> Iterator[None]:
    """Turns an exception of code in a user's file into a `UserError` that names the line.

    If the setting names no Python file, all exceptions are raised unchanged.

    Args:
      setting: the setting that contains the value.
      value: FILE.py:NAME, or any other text.
      what: what fails, for the message.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # user code may raise anything
        if not is_python_reference(value):
            raise
        file = value.rpartition(":")[0]
        frame = _last_frame(error, {file})
        line = frame.lineno if frame else None
        if isinstance(error, SyntaxError) and error.filename == file:
            line = error.lineno
        place = f", line {line}" if line else ""
        raise UserError(
            f"{setting} is {value!r}, whose {what} "
            f"({type(error).__name__}: {one_line(error)[:200]}{place})"
        ) from error


def place_in_own_file(error: BaseException) -> str | None:
    """Returns the last line of a user's file that an exception passed through.

    Returns:
      The file, the line and the function in one text; None if no such file has a part in it.
    """
    modules = [module for name, module in sys.modules.items() if name.startswith(MODULE_PREFIX)]
    frame = _last_frame(error, {str(module.__file__) for module in modules})
    return f"{frame.filename!r}, line {frame.lineno}, in {frame.name}" if frame else None


def _last_frame(error: BaseException, files: Set[str]) -> traceback.FrameSummary | None:
    """Returns the innermost frame of an exception in one of the files; None if there is none.

    TensorFlow calls Python code of the input pipeline in threads of its own. Only the message of
    its exception has the frames of that code.
    """
    frames = [
        *traceback.extract_tb(error.__traceback__),
        *(
            traceback.FrameSummary(file, int(line), name)
            for file, line, name in re.findall(r'\n  File "(.+)", line (\d+), in (.+)', str(error))
        ),
    ]
    return next((frame for frame in reversed(frames) if frame.filename in files), None)


def _find(setting: str, reference: str) -> tuple[str, Any]:
    """Imports a Python file, and returns the name in a reference and what it stands for."""
    path, _, name = reference.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{setting} is {reference!r}, and there is no file {str(file)!r}")
    # One module per file, with a unique name: several settings may name the same file. A Python
    # session may change the file between two runs.
    identity = f"{file.resolve()} {digest_of_file(reference)}"
    module_name = f"{MODULE_PREFIX}{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            with failures_in_one_line(setting, reference, "file cannot be imported"):
                spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    found = getattr(module, name, None)
    if found is None:
        raise UserError(f"{setting} is {reference!r}, but the file defines no {name}")
    return name, found


def reference_of(kind: type) -> str:
    """Returns FILE.py:NAME of a class; the file is `interactive.py` if there is no source file."""
    try:
        file = inspect.getsourcefile(kind) or ""
    except (TypeError, OSError):
        file = ""
    return f"{file if file.endswith('.py') else 'interactive.py'}:{kind.__name__}"


def digest_of_file(reference: str) -> str:
    """Returns the SHA-256 of the file in a reference; `missing` if it cannot be read."""
    try:
        return hashlib.sha256(Path(reference.rpartition(":")[0]).read_bytes()).hexdigest()
    except OSError:
        return "missing"
