"""The tasks that recipes are compared on, and their photos in folds."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.harness import ROOT
from research.data.source import Example, Source

# Drawn by benchmarks/drawn_tasks.py, with the name of the class that draws them.
DRAWN = {"beetles": "Beetles", "textures": "Textures", "typefaces": "Typefaces"}
# Built into the package: they must not be prepared in the folder of other data sets.
BUILT_IN = ("digits", "sketches")
# Flags of a task, added to each row. A mirrored digit is a different symbol, and digits always
# fill their images to the same extent, so that evaluation must use the training size.
DATA_FLAGS = {"digits": ("--nohorizontal_flip", "--nomirror_averaging", "--evaluation_scale=1")}


@dataclasses.dataclass(frozen=True)
class Task:
    """Photos to learn from.

    Attributes:
      name: in tables and results.
      photos: the flags of run_train.py that select the photos.
      others: flags that override those of a row, because they follow from the photos.
    """

    name: str
    photos: tuple[str, ...]
    others: tuple[str, ...] = ()


def parse_task(text: str, data_dir: str | None = None) -> Task:
    """Returns the task that a command names.

    Args:
      text: a drawn task, `NAME=FOLDER` for a folder of photos, or the name of a TFDS data set.
      data_dir: the folder of prepared TFDS data sets.

    Raises:
      argparse.ArgumentTypeError: the folder does not exist.
    """
    name, is_folder, folder = text.partition("=")
    if is_folder:
        if not name or not Path(folder).is_dir():
            raise argparse.ArgumentTypeError(
                f"the task is {text!r}; expected NAME=FOLDER with an existing folder of photos, a "
                f"TFDS data set, or one of: {', '.join(DRAWN)}"
            )
        return Task(name, (f"--image_folder={Path(folder).absolute()}",))
    if name in DRAWN:
        return Task(name, (f"--source={ROOT / 'benchmarks' / 'drawn_tasks.py'}:{DRAWN[name]}",))
    prepared: tuple[str, ...] = ()
    if data_dir and name not in BUILT_IN:
        prepared = (f"--data_dir={Path(data_dir).absolute()}",)
    return Task(name, (f"--dataset={name}", *prepared), DATA_FLAGS.get(name, ()))


def parse_tasks(texts: Sequence[str], data_dir: str | None = None) -> list[Task]:
    """Returns the tasks that a command names; see `parse_task`.

    Raises:
      argparse.ArgumentTypeError: a folder does not exist, or two tasks have the same name.
    """
    tasks = [parse_task(text, data_dir) for text in texts]
    names = [task.name for task in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise argparse.ArgumentTypeError(
            f"two tasks have the name {twice[0]!r}; expected a different name for each"
        )
    return tasks


def read_tasks(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, known_rows: Sequence[str]
) -> list[Task]:
    """Returns the tasks of a command. Ends the program with a message if they cannot be used.

    Args:
      parser: reports what is wrong.
      arguments: with `tasks`, `data_dir`, `rows`, `weights` and `report`. A report needs neither
        tasks nor weights.
      known_rows: all rows that may be named.
    """
    try:
        tasks = parse_tasks(arguments.tasks or (), arguments.data_dir)
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    unknown = [row for row in arguments.rows or () if row not in known_rows]
    if unknown:
        parser.error(f"there is no row {unknown[0]!r}; expected one of: {'; '.join(known_rows)}")
    if arguments.report:
        return tasks
    if not tasks or not arguments.weights:
        parser.error("--tasks and --weights are needed")
    if arguments.weights != "none" and not Path(arguments.weights).is_file():
        parser.error(f"--weights is {arguments.weights!r}; expected an existing file, or none")
    return tasks


def absolute(weights: str) -> str:
    """Returns the absolute path of a weights file; `none` as it is."""
    return weights if weights == "none" else str(Path(weights).absolute())


def hash_of_weights(weights: str) -> str:
    """Returns what identifies the content of a weights file in results; `none` as it is.

    Raises:
      OSError: the file cannot be read.
    """
    if weights == "none":
        return weights
    return hashlib.sha256(Path(weights).read_bytes()).hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Fold:
    """A fold of the photos to evaluate on; training uses the others.

    Attributes:
      seed: of the run, and of the division into folds.
      index: of the fold to evaluate on.
      folds: the number of folds.
    """

    seed: int
    index: int
    folds: int

    def split_of(self, name: str) -> str:
        """Returns `test`, `validation` or `train` for a photo's name."""
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        place = int.from_bytes(digest[:4], "big")
        if place % self.folds == self.index:
            return "test"
        return "validation" if place // self.folds % 10 == 0 else "train"


class DividedSource(Source):
    """Photos in splits of one's own.

    Args:
      class_names: by label.
      photos: the photos of each split.
    """

    def __init__(self, class_names: tuple[str, ...], photos: dict[str, list[Example]]) -> None:
        self.class_names = class_names
        self._photos = photos

    def count(self, split: str) -> int:
        return len(self._photos.get(split, ()))

    def examples(self, split: str) -> Iterator[Example]:
        yield from self._photos.get(split, ())


def all_photos(source: Source) -> list[Example]:
    """Returns the photos of all splits."""
    splits = ("train", "validation", "test")
    return [photo for split in splits for photo in source.examples(split)]


def divide(source: Source, fold: Fold) -> DividedSource:
    """Returns the same photos in the splits of a fold."""
    photos: dict[str, list[Example]] = {}
    for photo in all_photos(source):
        photos.setdefault(fold.split_of(photo.name), []).append(photo)
    return DividedSource(source.class_names, photos)
