"""What photos come from: encoded examples of some classes, in splits, in a fixed order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from research.photos.decode import DamagedImageError
from research.photos.files import read_image_file

SPLITS = ("train", "validation", "test")


class EncodedExample(NamedTuple):
    """One photo as it is stored: file content, class index and a name that a person can find.

    The content is None where the file cannot be read, for the reason in `problem`.
    """

    encoded: bytes | None
    label: int
    name: str
    problem: str = "cannot be read"


def read_example(file: Path, label: int, name: str) -> EncodedExample:
    """Returns what a file contains, or why that cannot be read."""
    try:
        return EncodedExample(read_image_file(file), label, name)
    except DamagedImageError as damage:
        return EncodedExample(None, label, name, str(damage))


class Source(Protocol):
    """A labelled set of photos, split in train, validation and test."""

    class_names: tuple[str, ...]

    def count(self, split: str) -> int:
        """Returns the number of stored photos of a split, damaged ones included."""
        ...

    def examples(self, split: str) -> Iterator[EncodedExample]:
        """Yields the photos of a split, always in the same order."""
        ...
