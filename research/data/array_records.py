"""Data sets of TFDS in the ArrayRecord format, whose examples can be read in any order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

ID = "tfds_id"  # the key of an example's name, as tf.data gives it


class ArrayRecords:
    """The examples of a part of a data set. They are read in several threads at once.

    Args:
      builder: of a prepared data set in the ArrayRecord format.
      expression: of TFDS, such as `train[:80%]`.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, expression: str) -> None:
        # Images are decoded by this project, in the same way as those of other sources.
        images = {
            key: tfds.decode.SkipDecoding()
            for key, feature in (builder.info.features or {}).items()
            if isinstance(feature, tfds.features.Image)
        }
        self._records = builder.as_data_source(expression, decoders=images)
        self._files = builder.info.splits[expression].file_instructions
        self._ends = np.cumsum([file.take for file in self._files])

    def read(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Returns the examples with these indices: features by name, and the example's `ID`.

        Raises:
          OSError: a file ends before an example.
          RuntimeError: a file cannot be read, or is damaged.
        """
        named = []
        for index, record in zip(indices, self._records.__getitems__(indices), strict=True):
            name = self._name_of(index)
            if any(value is None for value in record.values()):
                raise OSError(f"there is no {name.decode()!r}")
            named.append({**record, ID: name})
        return named

    def _name_of(self, index: int) -> bytes:
        place = int(np.searchsorted(self._ends, index, side="right"))
        file = self._files[place]
        return name_of_record(file, index - (int(self._ends[place]) - file.take) + file.skip)


def name_of_record(file: Any, row: int) -> bytes:
    """Returns the name that `as_dataset` gives to an example.

    Args:
      file: the `FileInstruction` of TFDS for the file of the example.
      row: position of the example in the file.
    """
    return f"{os.path.basename(file.filename)}__{row}".encode()
