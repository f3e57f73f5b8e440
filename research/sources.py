"""Where photos come from: a folder or a TFDS data set, as encoded examples in a fixed order."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import tensorflow as tf
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import downloader

from research.digits import Digits
from research.errors import UserError
from research.sketches import Sketches

SPLITS = ("train", "validation", "test")
BUILT_IN = (Sketches, Digits)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
WAYS_OUT = (
    "give --data_dir=DIR with the data set prepared, --image_folder=DIR with the unzipped photos "
    "(one subfolder a class), or --dataset=sketches, which needs no download"
)


class EncodedExample(NamedTuple):
    """One photo as it is stored: file content, class index and a name that a person can find.

    The content is None where the file cannot be read.
    """

    encoded: bytes | None
    label: int
    name: str


class Source(Protocol):
    """A labelled set of photos, split in train, validation and test."""

    class_names: tuple[str, ...]

    def count(self, split: str) -> int:
        """Returns the number of stored photos of a split, damaged ones included."""
        ...

    def examples(self, split: str) -> Iterator[EncodedExample]:
        """Yields the photos of a split, always in the same order."""
        ...


def printable(name: str) -> str:
    """Returns a file's name with bytes that are no UTF-8 written as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def in_one_line(name: str) -> str:
    """Returns a file's name with what cannot be printed, line breaks above all, as escapes."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in printable(name)
    )


def split_fraction(name: str) -> float:
    """Returns a number in [0, 1) that depends on nothing but the name."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


class FolderSource:
    """A folder with one subfolder of images a class.

    A photo's split follows from the hash of its path below the class folder, so that it never
    changes when other photos come or go: 80 % train, 10 % validation, 10 % test. Photos are
    ordered by that hash, which mixes the classes.

    Raises:
      UserError: the folder is missing, or holds fewer than two classes with images.
    """

    def __init__(self, folder: str) -> None:
        root = Path(folder)
        try:
            if not root.is_dir():
                raise UserError(f"image_folder is {folder!r}; expected a folder that exists")
            found = {
                child.name: image_files(child)
                for child in sorted(root.iterdir())
                if child.is_dir() and not child.name.startswith(".")
            }
        except OSError as error:
            raise UserError(f"image_folder {folder!r} cannot be read: {error.strerror}") from error
        classes = {name: files for name, files in found.items() if files}
        if len(classes) < 2:
            images = f"images of {len(classes)} class" if classes else "no image"
            raise UserError(
                f"image_folder {folder!r} has {images} in its subfolders; expected one subfolder "
                "of images (JPEG, PNG, ...) a class, and at least two"
            )
        self.class_names = tuple(map(printable, classes))
        self._root = root
        self._files: dict[str, list[tuple[float, str, int]]] = {split: [] for split in SPLITS}
        for label, (name, files) in enumerate(classes.items()):
            for file in files:
                fraction = split_fraction(file.relative_to(root / name).as_posix())
                split = SPLITS[0 if fraction < 0.8 else 1 if fraction < 0.9 else 2]
                path = file.relative_to(root).as_posix()
                self._files[split].append((fraction, path, label))
        for listed in self._files.values():
            listed.sort()

    def count(self, split: str) -> int:
        return len(self._listed(split))

    def examples(self, split: str) -> Iterator[EncodedExample]:
        for _, path, label in self._listed(split):
            encoded = None
            with contextlib.suppress(OSError):
                encoded = (self._root / path).read_bytes()
            yield EncodedExample(encoded, label, printable(path))

    def _listed(self, split: str) -> list[tuple[float, str, int]]:
        if split not in SPLITS:
            raise UserError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
        return self._files[split]


def image_files(folder: Path) -> list[Path]:
    """Returns the images in a folder and below, by their names' endings, in order."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )


class TfdsSource:
    """An image classification data set of TensorFlow Datasets, prepared when first read.

    A data set with only one split is cut 80/10/10; one with a test or a validation split of its
    own keeps it as `test`, and gives a tenth of `train` to validation where it has no other.

    Raises:
      UserError: the name is unknown or the set has no image with a class label; on reading, it is
        not prepared and cannot be downloaded.
    """

    def __init__(self, name: str, data_dir: str | None = None) -> None:
        self._name = name
        self._builder = _find_builder(name, data_dir)
        features = self._builder.info.features or {}
        images = [key for key, f in features.items() if isinstance(f, tfds.features.Image)]
        labels = [key for key, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
        if not images or not labels:
            raise UserError(
                f"dataset is {name!r}, which has no image with a class label; expected an image "
                "classification data set such as cats_vs_dogs, oxford_iiit_pet or sketches"
            )
        # A set may hold other pictures and labels (a mask, a species) beside the main ones.
        self._image = "image" if "image" in images else images[0]
        self._label = "label" if "label" in labels else labels[0]
        names = (key for key in features if "file" in key and "name" in key)
        self._file_name = next(names, None)
        if not features[self._label].num_classes:
            _prepare(self._builder, name)  # it learns its classes only then
        self.class_names = tuple(features[self._label].names)

    def count(self, split: str) -> int:
        expression = self._expression(split)  # it prepares the data set: the splits are known then
        return int(self._builder.info.splits[expression].num_examples)

    def examples(self, split: str) -> Iterator[EncodedExample]:
        options = tf.data.Options()
        options.autotune.enabled = False  # its thread holds up an iterator's end for seconds
        if not self.count(split):
            return  # TFDS refuses to read nothing
        stored = self._builder.as_dataset(
            split=self._expression(split),
            decoders=tfds.decode.PartialDecoding(
                [key for key in (self._image, self._label, self._file_name) if key],
                {self._image: tfds.decode.SkipDecoding()},
            ),
            # One file after the other, so that the order does not depend on the machine.
            read_config=tfds.ReadConfig(
                options=options,
                add_tfds_id=True,
                try_autocache=False,
                interleave_cycle_length=1,
            ),
        )
        # One by one, Python would be what decoding waits for.
        for batch in stored.batch(64).as_numpy_iterator():
            names = batch[self._file_name or "tfds_id"]
            for encoded, label, name in zip(
                batch[self._image], batch[self._label], names, strict=True
            ):
                yield EncodedExample(encoded, int(label), name.decode("utf-8", "replace"))

    def _expression(self, split: str) -> str:
        _prepare(self._builder, self._name)
        own = self._builder.info.splits
        expression = standard_splits(tuple(own)).get(split, split)
        try:
            own[expression].num_examples  # noqa: B018
        except Exception as error:  # TFDS raises many kinds for an expression that it cannot read
            raise UserError(
                f"split is {split!r}; expected train, validation, test, or a TFDS expression over "
                f"the splits {', '.join(own)} of {self._name}"
            ) from error
        return expression


def standard_splits(own: tuple[str, ...]) -> Mapping[str, str]:
    """Maps train, validation and test to TFDS expressions over the splits that a set has.

    They are disjoint, and leave no example of the set's labelled splits out.
    """
    train = "train" if "train" in own else own[0]
    held_out = [name for name in ("test", "validation", "val") if name in own and name != train]
    if not held_out:
        return {
            "train": f"{train}[:80%]",
            "validation": f"{train}[80%:90%]",
            "test": f"{train}[90%:]",
        }
    if len(held_out) == 1:
        return {
            "train": f"{train}[:90%]",
            "validation": f"{train}[90%:]",
            "test": held_out[0],
        }
    return {"train": train, "validation": held_out[1], "test": held_out[0]}


def _find_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    for built_in in BUILT_IN:
        if name == built_in.name:
            return built_in(data_dir=data_dir)
    known = [*tfds.list_builders(with_community_datasets=False), *(one.name for one in BUILT_IN)]
    root = data_dir or tfds.core.constants.DATA_DIR
    base_name = name.partition(":")[0].partition("/")[0]
    # Asked for another name, TFDS would look for it in the cloud, and wait long without a network.
    if base_name not in known and not os.path.isdir(os.path.join(root, base_name)):
        nearest = difflib.get_close_matches(name, known, n=3)
        hint = f", nearest: {', '.join(nearest)}" if nearest else ""
        raise UserError(
            f"dataset is {name!r}; expected the name of a TFDS data set{hint}; for photos of your "
            "own give --image_folder=DIR"
        )
    try:
        return tfds.builder(name, data_dir=data_dir)
    except Exception as error:  # a wrong version, a broken builder: TFDS raises what it likes
        raise UserError(
            f"dataset {name!r} cannot be opened ({_first_line(error)}); {WAYS_OUT}"
        ) from error


def _prepare(builder: tfds.core.DatasetBuilder, name: str) -> None:
    if builder.is_prepared():
        return
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    # The downloader's library warns of each try; the outcome is told once, below.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    # Ten tries with doubling pauses keep a machine without a network waiting for 200 seconds.
    downloader.MAX_RETRIES = 2
    root = Path(builder.data_path).parents[1]
    existed = root.exists()
    try:
        builder.download_and_prepare()
    except Exception as error:  # whatever TFDS and its downloader raise, the ways out are the same
        for folder in (root / "downloads", root / builder.name):
            _remove_empty_folders(folder)
        if not existed:
            _remove_empty_folders(root)
        reason = _first_line(error)
        raise UserError(
            f"dataset {name!r} is not prepared and could not be downloaded ({reason}); {WAYS_OUT}"
        ) from error


def _remove_empty_folders(root: Path) -> None:
    """Removes a folder that holds nothing but folders, or those in it that do."""
    for folder, _, _ in os.walk(root, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(folder)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def open_source(dataset: str, image_folder: str | None, data_dir: str | None) -> Source:
    """Returns the folder if one is given, else the TFDS data set."""
    if image_folder is not None:
        return FolderSource(image_folder)
    return TfdsSource(dataset, os.path.expanduser(data_dir) if data_dir else None)
