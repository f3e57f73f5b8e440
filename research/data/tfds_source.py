"""Photos from TensorFlow Datasets (TFDS), including the built-in data sets."""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import downloader
from tensorflow_datasets.core.file_adapters import FileFormat

from research.data.array_records import ID, ArrayRecords
from research.data.built_in.digits import Digits
from research.data.built_in.sketches import Sketches
from research.data.folder.findings import note_empty_splits
from research.data.folder.folder_options import Shares
from research.data.folder.photo_tree import state_of_file
from research.data.source import Example, Source
from research.data.tf_records import read_tf_records
from research.system import devices
from research.system.errors import UserError, first_line
from research.system.printable import printable

READ_AT_ONCE = 64  # examples of an ArrayRecord file
BUILT_IN = (Sketches, Digits)
WAYS_OUT = (
    "give --data_dir=DIR with the prepared data set, --image_folder=DIR with the unzipped photos "
    "(one subfolder per class), or --dataset=sketches, which needs no download"
)


class TfdsSource(Source):
    """An image classification data set of TFDS, prepared when it is first read.

    A data set with one split is divided by `shares`. A data set with a test or a validation split
    keeps it as `test`. If it has only one of them, the share of validation is taken from `train`.
    Splits without labels are left out.

    The photos of a data set in the ArrayRecord format can be read in any order.

    Labels are class indices. A data set whose photos have several labels (a sequence of class
    labels, or a dictionary of booleans) gives arrays of 0 and 1, one element per class.

    Raises:
      UserError: the name is unknown, the data set has no image with a class label, or it is not
        clear which, or it is not prepared and cannot be downloaded (raised when it is read).
    """

    def __init__(
        self, name: str, data_dir: str | None = None, shares: Shares = (80, 10, 10)
    ) -> None:
        self._name, self._shares = name, shares
        self._builder = _find_builder(name, data_dir)
        self.random_access = self._builder.info.file_format is FileFormat.ARRAY_RECORD
        self._opened: dict[str, ArrayRecords] = {}
        features = dict(sorted((self._builder.info.features or {}).items()))
        # A data set can have further images and labels, such as a mask or a species.
        self._image = _choose(name, features, "image", _is_image)
        single = any(isinstance(one, tfds.features.ClassLabel) for one in features.values())
        self._label = _choose(name, features, "label", _is_label if single else _is_label_set)
        if getattr(features[self._image], "np_dtype", np.uint8) not in (np.uint8, np.uint16):
            raise UserError(
                f"dataset is {name!r}, whose {self._image!r} has pixels of type "
                f"{np.dtype(features[self._image].np_dtype).name}; expected 8 or 16 bits"
            )
        texts = [key for key, one in features.items() if isinstance(one, tfds.features.Text)]
        self._file_name = next((key for key in texts if "file" in key and "name" in key), None)
        label = features[self._label]
        if isinstance(label, tfds.features.Sequence):
            label = label.feature
        if isinstance(label, tfds.features.ClassLabel) and not label.num_classes:
            _prepare(self._builder, name)  # only a prepared data set knows its classes
        named = label.names if isinstance(label, tfds.features.ClassLabel) else sorted(label)
        self.class_names = tuple(map(printable, named))

    @functools.cached_property
    def _splits(self) -> Mapping[str, str]:
        """The TFDS expressions of train, validation and test."""
        _prepare(self._builder, self._name)  # so that its splits are known
        own = {name: split.num_examples for name, split in self._builder.info.splits.items()}
        labelled = tuple(name for name, count in own.items() if count and self._has_labels(name))
        if not labelled:
            raise UserError(
                f"dataset is {self._name!r}, whose splits {', '.join(own)} have no labels; "
                "expected a data set with class labels"
            )
        splits = standard_splits(labelled, self._shares)
        expressions = [expression.partition("[")[0] for expression in splits.values()]
        unused = [name for name in labelled if name not in expressions]
        unused += [f"{name} (no labels)" for name in own if name not in labelled]
        used = ", ".join(f"{split} {expression or '-'}" for split, expression in splits.items())
        self.summary = f"{used}; left out: {', '.join(unused)}" if unused else used
        filled = [
            split
            for split, expression in splits.items()
            if expression and self._builder.info.splits[expression].num_examples
        ]
        self.notes = tuple(note_empty_splits(filled, self._shares))
        return splits

    def _has_labels(self, split: str) -> bool:
        """Returns whether the first photos of a split have a label."""
        # A single photo may have none of the classes.
        count = min(64 if self._label_set else 1, self._builder.info.splits[split].num_examples)
        first = map(self._example, self._records(f"{split}[:{count}]"))
        return any(np.any(one.label) if self._label_set else one.image is not None for one in first)

    @functools.cached_property
    def _label_set(self) -> bool:
        return _is_label_set(self._builder.info.features[self._label])

    def _array_records(self, expression: str) -> ArrayRecords:
        if expression not in self._opened:
            self._opened[expression] = ArrayRecords(self._builder, expression)
        return self._opened[expression]

    def count(self, split: str) -> int:
        expression = self._expression(split)
        return int(self._builder.info.splits[expression].num_examples) if expression else 0

    def examples(self, split: str) -> Iterator[Example]:
        if self.count(split):  # TFDS refuses to read an empty split
            yield from map(self._example, self._records(self._expression(split)))

    def listed(self, split: str) -> list[Example]:
        return [
            one if one.image is None else one._replace(image=b"") for one in self.examples(split)
        ]

    def read(self, split: str, index: int) -> Example:
        with self._read_errors_reported():
            (record,) = self._array_records(self._expression(split)).read([index])
        return self._example(record)

    def _example(self, record: Mapping[str, Any]) -> Example:
        image, label = record[self._image], record[self._label]
        name = printable(record[self._file_name or ID].decode("utf-8", "replace"))
        if isinstance(label, dict):
            return Example(image, np.asarray([label[one] for one in sorted(label)], np.int32), name)
        if self._label_set:
            vector = np.zeros(len(self.class_names), np.int32)
            vector[[one for one in label if 0 <= one < len(vector)]] = 1
            return Example(image, vector, name)
        if label < 0:
            return Example(None, 0, name, "has no label")
        return Example(image, int(label), name)

    def origin(self, split: str) -> str | None:
        expression = self._expression(split)
        info, folder = self._builder.info, Path(self._builder.data_path)
        files = [f"{one.name} {state_of_file(str(one))}" for one in sorted(folder.iterdir())]
        return " ".join([info.full_name, expression, *files]) if expression else None

    def _records(self, expression: str) -> Iterator[dict[str, Any]]:
        """Yields the features of each example by name, always in the same order."""
        keys = [key for key in (self._image, self._label, self._file_name) if key]
        with self._read_errors_reported():
            if self.random_access:
                count = self._builder.info.splits[expression].num_examples
                for first in range(0, count, READ_AT_ONCE):
                    rows = range(first, min(first + READ_AT_ONCE, count))
                    yield from self._array_records(expression).read(rows)
            elif self._builder.info.file_format is FileFormat.TFRECORD:
                yield from read_tf_records(self._builder, expression, keys)
            else:
                decoders = tfds.decode.PartialDecoding(
                    keys, {self._image: tfds.decode.SkipDecoding()}
                )
                # Files are read one after another, so that the order is the same everywhere.
                read_config = tfds.ReadConfig(
                    add_tfds_id=True, try_autocache=False, interleave_cycle_length=1
                )
                stored = self._builder.as_dataset(
                    split=expression, decoders=decoders, read_config=read_config
                )
                yield from stored.with_options(devices.pipeline_options()).as_numpy_iterator()

    @contextlib.contextmanager
    def _read_errors_reported(self) -> Iterator[None]:
        """Raises `UserError` for a file that cannot be read in the block."""
        try:
            yield
        except (NotImplementedError, RecursionError, tf.errors.ResourceExhaustedError):
            raise  # not a fault of the files
        except (OSError, RuntimeError, tf.errors.OpError) as error:  # depends on the format
            raise UserError(
                f"dataset {self._name!r} cannot be read ({_reason_of(error)}); restore its files "
                f"in {str(self._builder.data_path)!r}, or remove this folder to prepare it again"
            ) from error

    def _expression(self, split: str) -> str:
        expression = self._splits.get(split, split)
        own = self._builder.info.splits
        try:
            if expression:
                own[expression].num_examples  # noqa: B018
        except Exception as error:  # TFDS raises many types for an expression that it cannot parse
            raise UserError(
                f"split is {split!r}; expected train, validation, test, or a TFDS expression over "
                f"the splits {', '.join(own)} of {self._name}"
            ) from error
        return expression


def _is_image(feature: Any) -> bool:
    return isinstance(feature, tfds.features.Image)


def _is_label(feature: Any) -> bool:
    return isinstance(feature, tfds.features.ClassLabel)


def _is_label_set(feature: Any) -> bool:
    """Returns whether a feature holds several labels: class labels, or a boolean for each class."""
    if isinstance(feature, tfds.features.FeaturesDict):
        return all(one.shape == () and one.np_dtype == np.bool_ for one in feature.values())
    return isinstance(feature, tfds.features.Sequence) and _is_label(feature.feature)


def _choose(name: str, features: Mapping[str, Any], usual: str, fits: Callable[[Any], bool]) -> str:
    """Returns the key of the feature with the images or labels."""
    found = [key for key, feature in features.items() if fits(feature)]
    for key in (usual, f"{usual}s", *(found if len(found) == 1 else ())):
        if key in found:
            return key
    if found:
        raise UserError(
            f"dataset is {name!r}, which has several features of the kind {usual}: "
            f"{', '.join(found)}; expected one, or one named {usual!r}: write a source in a file "
            "of your own, see docs/extending.md"
        )
    kinds = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in features.items())
    raise UserError(
        f"dataset is {name!r}, which has no image with a class label, but {kinds[:300]}; expected "
        "an image classification data set such as cats_vs_dogs, oxford_iiit_pet or sketches"
    )


def standard_splits(own: tuple[str, ...], shares: Shares = (80, 10, 10)) -> Mapping[str, str]:
    """Maps train, validation and test to TFDS expressions over a data set's own splits.

    The results are disjoint. Splits of other names are not used. A split without photos has an
    empty expression.

    Args:
      own: the names of the splits with labels.
      shares: percentages of train, validation and test, if the data set does not have them.

    Raises:
      UserError: there are several splits, and none is named train.
    """
    train = "train" if "train" in own or len(own) > 1 else own[0]
    if train not in own:
        raise UserError(
            f"the data set has the splits {', '.join(own)} and no split named train; expected one: "
            "write a source in a file of your own, see docs/extending.md"
        )
    held_out = [
        name for name in ("test", "validation", "val", "dev") if name in own and name != train
    ]
    if len(held_out) > 1:
        return {"train": train, "validation": held_out[1], "test": held_out[0]}
    validation, test = shares[1], 0 if held_out else shares[2]
    first, second = 100 - validation - test, 100 - test
    return {
        "train": f"{train}[:{first}%]" if first < 100 else train,
        "validation": _range(train, first, second),
        "test": held_out[0] if held_out else _range(train, second, 100),
    }


def _range(split: str, start: int, end: int) -> str:
    if start == end:
        return ""
    return f"{split}[{start}%:{end if end < 100 else ''}{'%' if end < 100 else ''}]"


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
