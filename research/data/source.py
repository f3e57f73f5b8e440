"""`Source`: labelled photos in fixed splits and in a fixed order."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from research.system.errors import UserError

SPLITS = ("train", "validation", "test")
MAX_FILE_BYTES = 2**28
SEPARATOR = ";"  # between the labels of one photo, in text


class Example(NamedTuple):
    """One photo and its label.

    Attributes:
      image: the content of an image file; or uint8 RGB (height, width, 3); or None if the photo
        cannot be read.
      label: the index of a class; or, if the task expects it, any value of a fixed shape that
        NumPy can convert to numbers.
      name: a text by which a person can find the photo.
      problem: why the photo cannot be read, if `image` is None.
      arrays: further numbers by name, each of a fixed shape. The batch holds them by these names.
    """

    image: bytes | np.ndarray | None
    label: Any
    name: str
    problem: str = "cannot be read"
    arrays: Mapping[str, Any] = {}


def checked(example: object) -> Example:
    """Returns what a source gave as an example; raises `UserError` if it is none."""
    if not isinstance(example, Example):
        raise UserError(f"the source gives {example!r:.200}; expected an object of Example")
    if not isinstance(example.name, str):
        raise UserError(
            f"the source gives an example whose name is {example.name!r:.200}; expected a str"
        )
    if isinstance(example.image, (bytearray, memoryview)):
        return example._replace(image=bytes(example.image))
    if not isinstance(example.image, (bytes, np.ndarray, type(None))):
        kind = type(example.image).__name__
        raise UserError(
            f"the source gives the photo {example.name!r} as {kind}; expected bytes, a NumPy array "
            "or None"
        )
    return example


def counted(examples: Iterable[Example], count: int) -> Iterator[Example]:
    """Yields the examples of a split; raises `UserError` unless there are `count` of them."""
    yielded = 0
    for yielded, example in enumerate(examples, 1):
        if yielded > count:
            raise UserError(_miscounted("more", count))
        yield example
    if yielded < count:
        raise UserError(_miscounted("fewer", count))


def _miscounted(relation: str, count: int) -> str:
    return (
        f"the source yields {relation} photos than its count, {count:,}; correct its method `count`"
    )


def read_example(file: Path, label: int, name: str) -> Example:
    """Returns the content of a file, or the problem if it cannot be read.

    Only regular files of at most `MAX_FILE_BYTES` are read.
    """
    try:
        status = file.stat()  # opening a pipe would block, and opening a device may start it
        if stat.S_ISDIR(status.st_mode):
            problem = "a folder, not a file"
        elif not stat.S_ISREG(status.st_mode):
            problem = "a pipe, socket or device, not a file"
        elif status.st_size > MAX_FILE_BYTES:
            problem = f"a file of more than {MAX_FILE_BYTES:,} bytes"
        else:
            return Example(file.read_bytes(), label, name)
    except OSError as error:
        problem = f"cannot be read: {error.strerror or type(error).__name__}"
    return Example(None, label, name, problem)


def classes_of(label: Any, classes: int) -> tuple[int, ...] | None:
    """Returns the classes that a label names; None for labels of another kind.

    Args:
      label: a class index, or an array with a 0 or 1 per class.
      classes: number of classes.
    """
    values = np.asarray(label)
    if values.dtype.kind in "iu" and values.ndim == 0:
        return (int(values),)
    if values.dtype.kind in "iub" and values.shape == (classes,):
        return tuple(np.flatnonzero(values).tolist())
    return None


class Source:
    """Labelled photos, split into train, validation and test.

    To add a source, subclass this class in a file and give `--source=FILE.py:Class`. The class is
    constructed without arguments.

    Attributes:
      class_names: the names of the classes, in the order of their labels.
      summary: where the splits come from and what is left out, in one line; printed before the
        training. It may be empty.
      notes: what the user should know about the photos, one sentence each; printed after it.
      random_access: whether `listed` and `read` are defined, so that single photos can be read.
    """

    class_names: tuple[str, ...]
    summary: str = ""
    notes: tuple[str, ...] = ()
    random_access: bool = False

    def count(self, split: str) -> int:
        """Returns the number of photos of a split, including damaged photos.

        Raises:
          UserError: the split does not exist.
        """
        raise NotImplementedError

    def examples(self, split: str) -> Iterator[Example]:
        """Yields the photos of a split, in the same order at every call."""
        raise NotImplementedError

    def origin(self, split: str) -> str | None:
        """Returns a text that changes when the photos of a split or their labels change.

        It allows a photo cache on disk to recognise the photos without reading them. The default is
        None: the photos are not recognised, and not kept on disk.
        """
        return None

    def listed(self, split: str) -> Sequence[Example]:
        """Returns the photos of a split without their content, in the order of `examples`.

        The image is empty, or None if the photo is known to be unreadable.
        """
        raise NotImplementedError

    def read(self, split: str, index: int) -> Example:
        """Returns one photo of a split, in several threads at once.

        Args:
          split: name of the split.
          index: position in `examples`, from 0.
        """
        raise NotImplementedError
