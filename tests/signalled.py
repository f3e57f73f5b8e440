"""Runs a script of the project that gets signals at the end of a call of a function of its own.

python signalled.py SCRIPT:MODULE:FUNCTION:CALL:SIGNAL[:SIGNAL...] [--flag=value ...]

FUNCTION is `name` or `Class.method` in MODULE; CALL counts from 1.
"""

from __future__ import annotations

import functools
import importlib
import runpy
import signal
import sys
from typing import Any

from research.system.environment import import_tensorflow


def main() -> None:
    """Replaces the function and runs the script."""
    import_tensorflow()
    script, module, path, call, *signals = sys.argv[1].split(":")
    *parents, name = path.split(".")
    owner = functools.reduce(getattr, parents, importlib.import_module(module))
    original, calls = getattr(owner, name), 0

    def signalled(*values: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        result = original(*values, **named)
        if calls == int(call):
            for number in signals:
                signal.raise_signal(int(number))
        return result

    setattr(owner, name, signalled)
    sys.argv = [script, *sys.argv[2:]]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
