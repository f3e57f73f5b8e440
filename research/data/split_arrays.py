"""`SplitArrays`: the decoded and resized photos of a split, as arrays."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from research.data.decode import DamagedImageError, decode_image
from research.data.rows import Rows, rows_in_a_file
from research.data.source import Example, Source
from research.data.thread_pool import in_parallel
from research.system.errors import UserError
from research.system.machine import fits_in_memory

CHUNK_BYTES = 2**21  # maximum size of the decoded pixels of one chunk of photos
# The keys of a batch that arrays of a source must not use.
BATCH_KEYS = ("image", "mirrored", "label", "weight", "partner_label", "partner_share")


@dataclasses.dataclass(frozen=True)
class SplitArrays:
    """The examples of a split.

    Attributes:
      inputs: model inputs, arrays of shape (views * examples, ...). Photos are one array, uint8 RGB
        (examples, size, size, 3). Cached outputs are one or several arrays of activations.
      labels: (examples, ...), int32 for whole numbers such as class indices, otherwise float32.
      names: a readable name of each example.
      damaged: names and reasons of the photos that could not be decoded and are left out.
      views: number of views of each example in `inputs`. All examples in the first view come
        first, then all examples in the second view, and so on.
      digests: 16 hexadecimal digits of the hash of each photo's content; empty for activations.
      arrays: further arrays of the source by name, (examples, ...), int32 or float32.
    """

    inputs: tuple[np.ndarray, ...]
    labels: np.ndarray
    names: tuple[str, ...]
    damaged: tuple[tuple[str, str], ...] = ()
    views: int = 1
    digests: tuple[str, ...] = ()
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)


def load_split(
    source: Source,
    split: str,
    size: int,
    resize: str = "squash",
    on_photo: Callable[[], object] = lambda: None,
) -> SplitArrays:
    """Decodes and resizes all photos of a split, on all processors.

    Args:
      source: where the photos come from.
      split: name of a split of the source, such as 'train'.
      size: height and width in pixels to resize to.
      resize: how photos become squares, see `decode_image`.
      on_photo: called after each photo.

    Raises:
      UserError: labels or arrays of the source differ in shape or are not numeric, or an array has
        a reserved name.
    """
    shape = (source.count(split), size, size, 3)
    pixels = (Rows if fits_in_memory(math.prod(shape)) else rows_in_a_file)(shape, np.uint8)
    used: list[Example] = []
    digests: list[str] = []
    damaged: list[tuple[str, str]] = []

    def decode(image: bytes | np.ndarray) -> tuple[np.ndarray, str]:
        return decode_image(image, size, resize), digest_of(image)

    photos_per_chunk = max(1, min(CHUNK_BYTES // (3 * size * size), 32))
    with in_parallel(source.examples(split), decode, photos_per_chunk) as decoded:
        for example, result in decoded:
            if isinstance(result, DamagedImageError):
                damaged.append((example.name, str(result)))
            else:
                pixels.append(result[0][np.newaxis])
                digests.append(result[1])
                used.append(example._replace(image=None))
            on_photo()
    keys = sorted({key for example in used for key in example.arrays})
    taken = sorted({name for example in used for name in example.arrays} & set(BATCH_KEYS))
    if taken:
        raise UserError(
            f"the source has an array named {taken[0]!r}; expected a name other than "
            f"{', '.join(BATCH_KEYS)}"
        )
    return SplitArrays(
        (pixels.finish(),),
        _stack("label", [example.label for example in used]),
        tuple(example.name for example in used),
        tuple(damaged),
        digests=tuple(digests),
        arrays={key: _stack(key, [example.arrays.get(key) for example in used]) for key in keys},
    )


def _stack(name: str, values: list[Any]) -> np.ndarray:
    """Stacks one value per example into an int32 or float32 array."""
    try:
        array = np.asarray(values if values else np.zeros(0, np.int32))
        if array.dtype.kind not in "fiub":
            raise ValueError(f"{array.dtype} is not numeric")
        return array.astype(np.float32 if array.dtype.kind == "f" else np.int32)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the source's {name} cannot be put into one array ({error}); expected numbers of the "
            "same shape for each photo"
        ) from error


def digest_of(image: bytes | np.ndarray) -> str:
    """Returns the first 16 hexadecimal digits of the SHA-256 of a photo as it is stored.

    The decoded pixels of a file are not hashed, because they can differ between decoder versions.
    """
    if isinstance(image, np.ndarray):
        image = f"{image.shape}".encode() + image.tobytes()
    return hashlib.sha256(image).hexdigest()[:16]
