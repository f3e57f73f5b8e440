"""Runs a script that receives signals at the end of a chosen call of one of its functions.

python signalled.py SCRIPT:MODULE:FUNCTION:CALL:SIGNAL[:SIGNAL...] [--flag=value ...]

FUNCTION is `name` or `Class.method` in MODULE; CALL counts from 1.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import runpy
import signal
import sys
from collections.abc import Callable
from typing import Any

from research.system.environment import import_tensorflow

Function = Callable[..., Any]


def replace_function(module: str, path: str, wrap: Callable[[Function], Function]) -> None:
    """Replaces a function (`name` or `Class.method` in a module) by its wrapped version."""
    *parents, name = path.split(".")
    owner = functools.reduce(getattr, parents, importlib.import_module(module))
    setattr(owner, name, wrap(getattr(owner, name)))


def main() -> None:
    """Replaces the function and runs the script."""
    import_tensorflow()
    script, module, path, call, *signals = sys.argv[1].split(":")
    calls = itertools.count(1)

    def wrap(original: Function) -> Function:
        def signalled(*values: Any, **named: Any) -> Any:
            number = next(calls)
            result = original(*values, **named)
            if number == int(call):
                for one in signals:
                    signal.raise_signal(int(one))
            return result

        return signalled

    replace_function(module, path, wrap)
    sys.argv = [script, *sys.argv[2:]]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
