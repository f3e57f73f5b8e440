"""Text from elsewhere, such as a file's name, made fit to stand in a line of a terminal."""

from __future__ import annotations

import unicodedata


def printable(text: str) -> str:
    """Returns a text with what is not meant to be seen written as escapes.

    That is control characters (which could move a terminal's cursor or begin a new line), marks
    that turn the direction of writing, and bytes that are no UTF-8 as Python gives file names that
    hold them. What is escaped already stays as it is.
    """
    return "".join(map(_escaped, text))


def _escaped(letter: str) -> str:
    if letter.isprintable() or unicodedata.category(letter) == "Zs":
        return letter
    byte = ord(letter) - 0xDC00  # as PEP 383 has it
    if 0x80 <= byte <= 0xFF:
        return f"\\x{byte:02x}"
    return letter.encode("unicode_escape").decode("ascii")
