"""Data sets of TFDS in the TFRecord format, read without an input pipeline of TensorFlow."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import google_crc32c
import tensorflow as tf
import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError

from research.data.array_records import ID, name_of_record

BUFFER_BYTES, CHECKSUM_BYTES = 2**20, 4


def read_tf_records(
    builder: tfds.core.DatasetBuilder, expression: str, keys: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yields the examples of a part of a data set, in the order of its files.

    A pipeline of TensorFlow takes three times as long, and competes with the threads that decode.

    Args:
      builder: of a prepared data set in the TFRecord format.
      expression: of TFDS, such as `train[:80%]`.
      keys: the features to read.

    Yields:
      Features by name, and the example's `ID`. Images and texts are `bytes`, class labels `int`,
      sequences lists, and dictionaries are dictionaries.

    Raises:
      OSError: a file cannot be read, is damaged, or ends too early.
    """
    features = builder.info.features
    for file in builder.info.splits[expression].file_instructions:
        for row, record in enumerate(_records(file), file.skip):
            try:
                stored = tf.train.Example.FromString(record).features.feature
            except DecodeError as error:
                raise OSError(f"record {row:,} of {file.filename!r} is no example") from error
            example = {key: _value_of(key, features[key], stored) for key in keys}
            yield {**example, ID: name_of_record(file, row)}


def _value_of(key: str, feature: Any, stored: Mapping[str, Any]) -> Any:
    """Returns the value of a feature of TFDS in a parsed record."""
    if isinstance(feature, tfds.features.FeaturesDict):
        return {name: _value_of(f"{key}/{name}", one, stored) for name, one in feature.items()}
    kind = stored[key].WhichOneof("kind")
    values = getattr(stored[key], kind).value if kind else []
    if isinstance(feature, tfds.features.Sequence):
        return list(values)
    if len(values) != 1:
        raise OSError(f"a record has {len(values)} values of {key!r} instead of one")
    return values[0]


def _records(file: Any) -> Iterator[bytes]:
    """Yields the records that a `FileInstruction` of TFDS names.

    Each record has a length of 8 bytes before it. A checksum of 4 bytes follows both, see
    `tensorflow/core/lib/io/record_writer.h`.
    """
    with _open(file.filename) as opened:
        for row in range(file.skip + file.take):
            problem = f"{file.filename!r} ends or is damaged at record {row:,}"
            size = int.from_bytes(_checked(opened, 8, problem), "little")
            if row < file.skip:
                opened.seek(size + CHECKSUM_BYTES, os.SEEK_CUR)
            else:
                yield _checked(opened, size, problem)


def _checked(opened: Any, size: int, problem: str) -> bytes:
    """Reads `size` bytes and their checksum; raises `OSError` with `problem` if they differ."""
    stored, checksum = opened.read(size), opened.read(CHECKSUM_BYTES)
    if checksum != _checksum_of(stored):
        raise OSError(problem)
    return stored


def _open(name: str) -> Any:
    """Opens a local file, or one that only TensorFlow can open, for example in a bucket."""
    if os.path.exists(name):
        return open(name, "rb", buffering=BUFFER_BYTES)
    return tf.io.gfile.GFile(name, "rb")


def _checksum_of(stored: bytes) -> bytes:
    """Returns the masked CRC-32C of the format, 4 bytes."""
    crc = google_crc32c.value(stored)
    return (((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32).to_bytes(CHECKSUM_BYTES, "little")
