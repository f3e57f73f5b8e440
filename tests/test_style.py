"""The checks that keep the code readable: style, types, and which module may import which."""

from __future__ import annotations

import re
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


def test_the_reading_order_says_how_long_its_files_are():
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `(research/\S+\.py)` \| (\d+) \|", text, flags=re.M)
    lengths = [len((ROOT / file).read_text().splitlines()) for file, _ in rows]
    assert [int(lines) for _, lines in rows] == lengths
    assert f"These are {len(rows)} files and {sum(lengths):,} lines." in text
    assert len(rows) <= 10
    assert sum(lengths) <= 1500
