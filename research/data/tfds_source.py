"""Photos from TensorFlow Datasets (TFDS), including the built-in data sets."""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import downloader

from research.data.built_in.digits import Digits
from research.data.built_in.sketches import Sketches
from research.data.source import Example, Source
from research.system.errors import UserError, first_line
from research.system.printable import printable

BUILT_IN = (Sketches, Digits)
WAYS_OUT = (
    "give --data_dir=DIR with the prepared data set, --image_folder=DIR with the unzipped photos "
    "(one subfolder per class), or --dataset=sketches, which needs no download"
)


class TfdsSource(Source):
    """An image classification data set of TFDS, prepared when it is first read.

    A data set with one split is divided into 80 % train, 10 % validation and 10 % test. A data set
    with a test or a validation split keeps it as `test`. If it has only one of them, 10 % of
    `train` are used for validation.

    Raises:
      UserError: the name is unknown, the data set has no image with a class label, or it is not
        prepared and cannot be downloaded (raised when it is read).
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
        # A data set can have further images and labels, such as a mask or a species.
        self._image = "image" if "image" in images else images[0]
        self._label = "label" if "label" in labels else labels[0]
        self._file_name = next((key for key in features if "file" in key and "name" in key), None)
        if not features[self._label].num_classes:
            _prepare(self._builder, name)  # only a prepared data set knows its classes
        self.class_names = tuple(map(printable, features[self._label].names))

    def count(self, split: str) -> int:
        expression = self._expression(split)  # prepares the data set, so that its splits are known
        return int(self._builder.info.splits[expression].num_examples)

    def examples(self, split: str) -> Iterator[Example]:
        if not self.count(split):
            return  # TFDS refuses to read an empty split
        options = tf.data.Options()
        options.autotune.enabled = False  # its thread delays the end of an iterator by seconds
        stored = self._builder.as_dataset(
            split=self._expression(split),
            decoders=tfds.decode.PartialDecoding(
                [key for key in (self._image, self._label, self._file_name) if key],
                {self._image: tfds.decode.SkipDecoding()},
            ),
            # Files are read one after another, so that the order is the same on every machine.
            read_config=tfds.ReadConfig(
                options=options, add_tfds_id=True, try_autocache=False, interleave_cycle_length=1
            ),
        )
        # Reading examples one by one in Python would be slower than decoding them.
        for batch in stored.batch(64).as_numpy_iterator():
            keys = (self._image, self._label, self._file_name or "tfds_id")
            for image, label, name in zip(*(batch[key] for key in keys), strict=True):
                yield Example(image, int(label), printable(name.decode("utf-8", "replace")))

    def _expression(self, split: str) -> str:
        _prepare(self._builder, self._name)
        own = self._builder.info.splits
        expression = standard_splits(tuple(own)).get(split, split)
        try:
            own[expression].num_examples  # noqa: B018
        except Exception as error:  # TFDS raises many types for an expression that it cannot parse
            raise UserError(
                f"split is {split!r}; expected train, validation, test, or a TFDS expression over "
                f"the splits {', '.join(own)} of {self._name}"
            ) from error
        return expression


def standard_splits(own: tuple[str, ...]) -> Mapping[str, str]:
    """Maps train, validation and test to TFDS expressions over a data set's own splits.

    The results are disjoint and use every example of the labelled splits.
    """
    train = "train" if "train" in own else own[0]
    held_out = [name for name in ("test", "validation", "val") if name in own and name != train]
    if not held_out:
        ranges = {"train": "[:80%]", "validation": "[80%:90%]", "test": "[90%:]"}
        return {split: train + part for split, part in ranges.items()}
    if len(held_out) == 1:
        return {"train": f"{train}[:90%]", "validation": f"{train}[90%:]", "test": held_out[0]}
    return {"train": train, "validation": held_out[1], "test": held_out[0]}


def _find_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    for built_in in BUILT_IN:
        if name == built_in.name:
            return built_in(data_dir=data_dir)
    known = [*tfds.list_builders(with_community_datasets=False), *(one.name for one in BUILT_IN)]
    root = data_dir or tfds.core.constants.DATA_DIR
    # Only part of TFDS's syntax is allowed: a community's name would download and run code, and
    # settings after the version could change anything.
    match = re.fullmatch(r"(\w+)(/[\w+.-]+)?(:[\d*]+\.[\d*]+\.[\d*]+)?", name)
    base_name = match[1] if match else ""
    # TFDS looks for an unknown name in the cloud, and waits long without a network.
    if base_name not in known and not (base_name and os.path.isdir(os.path.join(root, base_name))):
        nearest = difflib.get_close_matches(name, known, n=3)
        hint = f", nearest: {', '.join(nearest)}" if nearest else ""
        raise UserError(
            f"dataset is {name!r}; expected the name of a TFDS data set{hint}; to use your own "
            "photos give --image_folder=DIR"
        )
    _check_features(Path(root) / base_name)
    try:
        return tfds.builder(name, data_dir=data_dir)
    except Exception as error:  # TFDS raises many types, for a wrong version or a broken builder
        raise UserError(
            f"dataset {name!r} cannot be opened ({_reason_of(error)}); {WAYS_OUT}"
        ) from error


def _check_features(folder: Path) -> None:
    """Raises `UserError` if a prepared data set names code, which TFDS would import."""
    for file in folder.rglob("features.json"):
        try:
            content = file.read_text(encoding="utf-8")
            json.loads(content, object_pairs_hook=_check_feature)
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(
                f"the data set in {str(folder)!r} cannot be used because of its {file.name}: "
                f"{error}; prepare it again, or give --image_folder=DIR"
            ) from error


def _check_feature(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, value in pairs:
        if not isinstance(value, str):
            continue
        names_code = key in ("type", "pythonClassName", "python_class_name")
        if names_code and not value.startswith("tensorflow_datasets."):
            raise ValueError(f"{value!r} is not a feature of TensorFlow Datasets")
        if value.lstrip().startswith("{"):  # older versions store JSON as a string in JSON
            json.loads(value, object_pairs_hook=_check_feature)
    return dict(pairs)


def _prepare(builder: tfds.core.DatasetBuilder, name: str) -> None:
    if builder.is_prepared():
        return
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    # The download library warns at each attempt. The error below reports the outcome once.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    # TFDS's ten attempts with doubling pauses take 200 seconds without a network.
    downloader.MAX_RETRIES = 2
    root = Path(builder.data_path).parents[1]
    existed = root.exists()
    try:
        builder.download_and_prepare()
    except Exception as error:  # the ways out are the same for every error
        for folder in (root / "downloads", root / builder.name, *([] if existed else [root])):
            _remove_empty_folders(folder)
        raise UserError(
            f"dataset {name!r} is not prepared and could not be downloaded ({_reason_of(error)}); "
            f"{WAYS_OUT}"
        ) from error


def _remove_empty_folders(root: Path) -> None:
    """Removes all folders below `root`, and `root` itself, that contain no files."""
    for folder, _, _ in os.walk(root, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(folder)


def _reason_of(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)[:160]}"
