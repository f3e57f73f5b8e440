"""Reads an untrusted file in the safetensors format: a JSON header, then raw numbers.

The format is eight bytes with the length of the header, the header, and the values of all tensors
without gaps (github.com/huggingface/safetensors). The header gives type, shape and place of each
tensor. Everything in it is checked before a value is read, and nothing in the file is executed.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from research.system.errors import UserError, one_line

LENGTH = struct.Struct("<Q")
MAX_HEADER_BYTES = 2**24  # the header of a network with a thousand tensors has 100 KB
MAX_DIMENSIONS = 8
DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    **{
        f"{kind}{8 * size}": np.dtype(f"<{kind.lower()}{size}")
        for kind in "IU"
        for size in (1, 2, 4, 8)
    },
    "BOOL": np.dtype("?"),
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, whose values have not been read.

    Attributes:
      path: the file.
      dtype: of the stored values.
      shape: as in the program that wrote the file.
      begin: position of the first value in the file, in bytes.
    """

    path: str
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int

    def read(self) -> np.ndarray:
        """Returns the values; raises `OSError` or `ValueError` if the file has become shorter."""
        values = np.fromfile(self.path, self.dtype, math.prod(self.shape), offset=self.begin)
        return values.reshape(self.shape)


def is_safetensors(path: str) -> bool:
    """Returns whether the content of a file, not its name, is in the safetensors format."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        start = file.read(LENGTH.size + 1)
    # The length is below 2^24, so its last bytes are 0; no other format of weights begins so.
    return start[3:9] == b"\0\0\0\0\0{"


def read_safetensors(path: str) -> dict[str, StoredTensor]:
    """Returns all tensors of a file by name, after checking that they are inside the file.

    Raises:
      UserError: if the header is damaged, or the tensors overlap, leave gaps or leave the file.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = LENGTH.unpack(file.read(LENGTH.size))
            if length > min(size - LENGTH.size, MAX_HEADER_BYTES):
                raise ValueError(f"its header would have {length:,} bytes")
            header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
        return _tensors(header, path, LENGTH.size + length, size)
    except (OSError, ValueError, RecursionError, struct.error) as error:
        raise UserError(
            f"weights file {path} cannot be read ({one_line(error)}); expected a safetensors file: "
            "it may be truncated or damaged"
        ) from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a name occurs twice in its header")
    return members


def _tensors(header: Any, path: str, start: int, size: int) -> dict[str, StoredTensor]:
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    tensors: dict[str, StoredTensor] = {}
    ends: list[tuple[int, int]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise ValueError(f"the entry of {name!r} is not complete")
        dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        shape, offsets = _sizes(entry["shape"], name), _sizes(entry["data_offsets"], name)
        if dtype is None:
            raise ValueError(f"{name!r} has the unknown type {entry['dtype']!r:.40}")
        if len(offsets) != 2 or len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"the entry of {name!r} is not valid")
        begin, end = offsets
        if end - begin != math.prod(shape) * dtype.itemsize or start + end > size:
            raise ValueError(f"the place of {name!r} does not fit its shape or the file")
        ends.append((begin, end))
        tensors[name] = StoredTensor(path, dtype, shape, start + begin)
    position = 0
    for begin, end in sorted(ends):
        if begin != position:
            raise ValueError("its tensors overlap or leave gaps")
        position = end
    if start + position != size:
        raise ValueError("it has bytes after the last tensor")
    return tensors


def _sizes(values: Any, name: str) -> tuple[int, ...]:
    is_list = isinstance(values, list) and all(type(value) is int for value in values)
    if not is_list or any(value < 0 for value in values):
        raise ValueError(f"{name!r} has a shape or place that is not a list of sizes")
    return tuple(values)
