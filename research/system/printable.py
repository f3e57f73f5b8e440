"""File names as text, text that is safe to print, and lines of CSV."""

from __future__ import annotations

import csv
import io
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path


def name_of(path: Path) -> str:
    """Returns a path as text: its bytes decoded as UTF-8, in every locale."""
    return os.fsencode(path.as_posix()).decode("utf-8", "surrogateescape")


def path_of(name: str) -> Path:
    """Returns the path whose text `name_of` returned."""
    return Path(os.fsdecode(name.encode("utf-8", "surrogateescape")))


def printable(text: str) -> str:
    """Replaces unprintable characters by escape sequences.

    They are control characters (which could move a terminal's cursor or start a new line), marks
    that change the writing direction, and bytes of file names that are not valid UTF-8. Existing
    escape sequences are kept.
    """
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    byte = ord(character) - 0xDC00  # an invalid byte, see PEP 383
    if 0x80 <= byte <= 0xFF:
        return f"\\x{byte:02x}"
    return character.encode("unicode_escape").decode("ascii")


def csv_line(cells: Iterable[object]) -> str:
    """Returns a line of CSV that ends with a line feed.

    Cells with a carriage return are quoted (RFC 4180). A writer of Python 3.11 whose lines end with
    a line feed does not quote them.
    """
    line = io.StringIO()
    csv.writer(line).writerow(cells)
    return line.getvalue().removesuffix("\r\n") + "\n"
