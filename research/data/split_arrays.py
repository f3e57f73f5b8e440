"""`SplitArrays`: the decoded and resized photos of a split, as arrays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from research.data.decode import DamagedImageError, decode_image
from research.data.digest import digest_of
from research.data.rows import Rows, rows_in_a_file
from research.data.source import Example, Source, checked, counted
from research.data.targets import stack_targets
from research.data.thread_pool import in_parallel
from research.system.machine import fits_in_memory

CHUNK_BYTES = 2**21  # maximum size of the decoded pixels of one chunk of photos


@dataclasses.dataclass(frozen=True)
class SplitArrays:
    """The examples of a split.

    Attributes:
      inputs: model inputs, arrays of shape (views * examples, ...). Photos are one array, uint8 RGB
        (examples, size, size, 3). Cached outputs are one or several arrays of activations. Other
        objects than arrays have `shape`, `dtype` and `take`.
      labels: (examples, ...), int32 for whole numbers such as class indices, otherwise float32.
      names: a readable name of each example.
      damaged: name, reason and index in the split of each photo that is left out as damaged.
      views: number of views of each example in `inputs`. All examples in the first view come
        first, then all examples in the second view, and so on.
      digests: 16 hexadecimal digits of the hash of each photo's content; empty for activations.
      arrays: further arrays of the source by name, (examples, ...), int32 or float32.
      weights: float32 (examples,), 0 for photos found to be damaged; None if there are none.
    """

    inputs: tuple[Any, ...]
    labels: np.ndarray
    names: tuple[str, ...]
    damaged: tuple[tuple[str, str, int], ...] = ()
    views: int = 1
    digests: tuple[str, ...] = ()
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)


def load_split(
    source: Source,
    split: str,
    size: int,
    resize: str = "squash",
    on_photo: Callable[[], object] = lambda: None,
) -> SplitArrays:
    """Decodes all photos of a split into memory, or into a file if they do not fit.

    Args:
      source: where the photos come from.
      split: name of a split of the source, such as 'train'.
      size: height and width in pixels to resize to.
      resize: how photos become squares, see `decode_image`.
      on_photo: called after each photo.

    Raises:
      UserError: see `decode_examples` and `counted`.
    """
    count = source.count(split)
    shape = (count, size, size, 3)
    pixels = (Rows if fits_in_memory(math.prod(shape)) else rows_in_a_file)(shape, np.uint8)
    return decode_examples(counted(source.examples(split), count), pixels, resize, on_photo)


def decode_examples(
    examples: Iterator[Example], pixels: Rows, resize: str, on_photo: Callable[[], object]
) -> SplitArrays:
    """Decodes and resizes photos, on all processors, and writes them to empty rows.

    Raises:
      UserError: the rows cannot be written; the source gives no examples, or more than its count;
        their labels or arrays differ in shape or are not numeric; or an array has a reserved name.
    """
    size = pixels.shape[1]
    used: list[Example] = []
    digests: list[str] = []
    damaged: list[tuple[str, str, int]] = []

    def decode(index: int, image: bytes | np.ndarray) -> str:
        pixels.write(index, decode_image(image, size, resize)[np.newaxis])
        return digest_of(image)

    photos_per_chunk = max(1, min(CHUNK_BYTES // (3 * size * size), 32))
    with in_parallel(map(checked, examples), decode, photos_per_chunk) as decoded:
        for index, example, result in decoded:
            if isinstance(result, DamagedImageError):
                damaged.append((example.name, str(result), index))
            else:
                digests.append(result)
                used.append(example._replace(image=None))
            on_photo()
    labels, arrays = stack_targets(used)
    return SplitArrays(
        (pixels.finish([index for _, _, index in damaged]),),
        labels,
        tuple(example.name for example in used),
        tuple(damaged),
        digests=tuple(digests),
        arrays=arrays,
    )
