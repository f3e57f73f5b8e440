"""The checks that keep the code readable: style, types, and which module may import which."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

COMMANDS = {
    "style": ["ruff", "check", "."],
    "format": ["ruff", "format", "--check", "."],
    "types": ["mypy"],
    "imports": ["lint-imports"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_check(name):
    command = COMMANDS[name]
    program = Path(sys.executable).parent / command[0]
    process = subprocess.run([program, *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
