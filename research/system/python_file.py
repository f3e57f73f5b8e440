"""Loads a class or function from a researcher's own file, given as FILE.py:NAME."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
import traceback
from pathlib import Path
from typing import Any

from research.system.errors import UserError, one_line


def is_python_reference(text: str) -> bool:
    """Returns whether a text has the form FILE.py:NAME."""
    file, _, name = text.rpartition(":")
    return file.endswith(".py") and name.isidentifier()


def load_from_file(setting: str, reference: str, base: type | None = None) -> Any:
    """Imports a file and returns what it defines under a name.

    Args:
      setting: the name of the setting that gave the reference, for messages.
      reference: FILE.py:NAME.
      base: a class that the result must be a subclass of; None for any callable.

    Raises:
      UserError: there is no such file or name, the import fails, or the result is of another kind.
    """
    path, _, name = reference.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{setting} is {reference!r}, and there is no file {str(file)!r}")
    # By a name of its own, and one module for each file: several settings may name it.
    module_name = f"user_file_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]}"
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever somebody's file raises
            del sys.modules[module_name]
            line = traceback.extract_tb(error.__traceback__)[-1].lineno
            if isinstance(error, SyntaxError):
                line = error.lineno
            raise UserError(
                f"{setting} is {reference!r}, whose file cannot be imported "
                f"({type(error).__name__}: {one_line(error)[:200]}, line {line})"
            ) from error
    found = getattr(module, name, None)
    if found is None:
        raise UserError(f"{setting} is {reference!r}, but the file defines no {name}")
    if base is not None and not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(
            f"{setting} is {reference!r}, but {name} is not a subclass of "
            f"{base.__module__}.{base.__name__}"
        )
    if not callable(found):
        raise UserError(f"{setting} is {reference!r}, but {name} is not a class or function")
    return found


def reference_of(kind: type) -> str:
    """Returns FILE.py:NAME of a class, `interactive.py` where it was not defined in a file."""
    try:
        file = inspect.getsourcefile(kind) or ""
    except (TypeError, OSError):
        file = ""
    return f"{file if file.endswith('.py') else 'interactive.py'}:{kind.__name__}"


def digest_of_file(reference: str) -> str:
    """Returns the SHA-256 of the file of a reference, or `missing`."""
    try:
        return hashlib.sha256(Path(reference.rpartition(":")[0]).read_bytes()).hexdigest()
    except OSError:
        return "missing"
