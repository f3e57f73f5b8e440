"""Loads a class or function from a user's Python file, given as FILE.py:NAME."""

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
    """Imports a Python file and returns a class or function that it defines.

    Args:
      setting: the setting that contains the reference, for error messages.
      reference: FILE.py:NAME.
      base: the required base class; None accepts any callable.

    Raises:
      UserError: there is no such file or name, the import fails, or the object has another type.
    """
    path, _, name = reference.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{setting} is {reference!r}, and there is no file {str(file)!r}")
    # One module per file, with a unique name: several settings may name the same file.
    module_name = f"user_file_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]}"
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # user code may raise anything
            del sys.modules[module_name]
            last = traceback.extract_tb(error.__traceback__)[-1]
            line = error.lineno if isinstance(error, SyntaxError) else last.lineno
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
    own = [key for key in vars(found) if not key.startswith("_") and callable(vars(found)[key])]
    unknown = [key for key in own if base is not None and not hasattr(base, key)]
    if base is not None and unknown:
        note = f"note: {name} defines {', '.join(unknown)}, which {base.__name__} does not have"
        print(f"{note}; begin the names of your own methods with _", file=sys.stderr, flush=True)
    return found


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
