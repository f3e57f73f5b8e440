"""`Source`: where photos come from, with labels, in splits, always in the same order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from research.data.decode import DamagedImageError
from research.data.files import read_image_file

SPLITS = ("train", "validation", "test")


class Example(NamedTuple):
    """One photo and its label, as a source yields them.

    Attributes:
      image: the content of an image file; or uint8 RGB (height, width, 3); or None where the photo
        cannot be read.
      label: the index of a class; or anything else of one fixed shape that NumPy makes numbers of,
        where the task expects it.
      name: by which a person can find the photo.
      problem: why the photo cannot be read, where `image` is None.
      arrays: further numbers of one fixed shape each, which arrive in the batch by their names.
    """

    image: bytes | np.ndarray | None
    label: Any
    name: str
    problem: str = "cannot be read"
    arrays: Mapping[str, Any] = {}


def read_example(file: Path, label: int, name: str) -> Example:
    """Returns what a file contains, or why that cannot be read."""
    try:
        return Example(read_image_file(file), label, name)
    except DamagedImageError as damage:
        return Example(None, label, name, str(damage))


class Source:
    """A labelled set of photos, split in train, validation and test.

    Subclass it in a file of your own and give `--source=FILE.py:Class`; the class is built without
    arguments.

    Attributes:
      class_names: the names of the classes, in the order of their labels.
    """

    class_names: tuple[str, ...]

    def count(self, split: str) -> int:
        """Returns the number of photos of a split, damaged ones included.

        Raises:
          UserError: there is no such split.
        """
        raise NotImplementedError

    def examples(self, split: str) -> Iterator[Example]:
        """Yields the photos of a split, always in the same order."""
        raise NotImplementedError
