"""Stacks the labels and further arrays of examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from research.data.source import Example
from research.system.errors import UserError

# The keys of a batch that arrays of a source must not use.
BATCH_KEYS = ("image", "mirrored", "label", "weight", "partner_label", "partner_share")


def stack_targets(examples: Sequence[Example]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns the labels, (examples, ...), and the further arrays by name, int32 or float32.

    Raises:
      UserError: labels or arrays differ in shape or are not numeric, or an array has a reserved
        name.
    """
    keys = sorted({key for example in examples for key in example.arrays})
    taken = sorted({name for example in examples for name in example.arrays} & set(BATCH_KEYS))
    if taken:
        raise UserError(
            f"the source has an array named {taken[0]!r}; expected a name other than "
            f"{', '.join(BATCH_KEYS)}"
        )
    arrays = {key: _stack(key, [example.arrays.get(key) for example in examples]) for key in keys}
    return _stack("label", [example.label for example in examples]), arrays


def join_targets(parts: Sequence[np.ndarray], name: str) -> np.ndarray:
    """Joins stacked values of several groups of examples; raises `UserError` if shapes differ."""
    if len({part.shape[1:] for part in parts}) > 1:
        raise UserError(_message(name, "the shapes differ"))
    joined = np.concatenate(parts)
    return joined.astype(np.float32) if joined.dtype.kind == "f" else joined


def _stack(name: str, values: list[Any]) -> np.ndarray:
    """Stacks a value per example into an int32 or float32 array."""
    try:
        array = np.asarray(values if values else np.zeros(0, np.int32))
        if array.dtype.kind not in "fiub":
            raise ValueError(f"{array.dtype} is not numeric")
        limits = np.iinfo(np.int32)
        if array.dtype.kind in "iu" and array.size:
            for value in (array.min(), array.max()):
                if not limits.min <= value <= limits.max:
                    raise ValueError(f"{value} needs more than 32 bits")
        return array.astype(np.float32 if array.dtype.kind == "f" else np.int32)
    except (TypeError, ValueError) as error:
        raise UserError(_message(name, error)) from error


def _message(name: str, reason: object) -> str:
    return (
        f"the source's {name} cannot be put into one array ({reason}); expected numbers of the "
        "same shape for each photo"
    )
