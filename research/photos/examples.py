"""Photos in the form that training wants: decoded once, resized, in one array, found by index."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from research.photos.decode import DamagedImageError, decode_image, oddities_ignored
from research.photos.parallel import in_parallel
from research.photos.rows import rows_of_size
from research.photos.source import EncodedExample, Source

CHUNK_BYTES = 2**21  # of pixels that a thread makes at a time


@dataclasses.dataclass(frozen=True)
class Examples:
    """A split, ready to be drawn from.

    Attributes:
      inputs: what the model takes; arrays of shape (views * examples, ...). For photos one array of
        uint8 RGB (examples, size, size, 3); for a cached trunk its activations, one or several.
      labels: int32 (examples,), class indices.
      names: a name for each example, for people.
      damaged: the names and reasons of those that could not be decoded, and are left out.
      views: how many ways of showing each example the inputs hold, one after another.
      digests: what tells each photo's content from others, 16 hexadecimal digits; none for
        activations.
    """

    inputs: tuple[np.ndarray, ...]
    labels: np.ndarray
    names: tuple[str, ...]
    damaged: tuple[tuple[str, str], ...] = ()
    views: int = 1
    digests: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)


class _Photo(NamedTuple):
    pixels: np.ndarray
    digest: str


def load_examples(
    source: Source, split: str, size: int, on_progress: Callable[[int, int], None] | None = None
) -> Examples:
    """Decodes and resizes all photos of a split, on all processors.

    Args:
      source: where the photos come from.
      split: its split, such as 'train'.
      size: height and width in pixels to resize to.
      on_progress: called with the number of photos done and their total, now and then.
    """
    count = source.count(split)
    pixels = rows_of_size((count, size, size, 3), np.uint8)
    labels: list[int] = []
    names: list[str] = []
    digests: list[str] = []
    damaged: list[tuple[str, str]] = []
    photos_a_chunk = max(1, min(CHUNK_BYTES // (3 * size * size), 32))

    def decode(example: EncodedExample) -> _Photo | DamagedImageError:
        if example.encoded is None:
            return DamagedImageError(example.problem)
        try:
            return _Photo(decode_image(example.encoded, size), digest_of(example.encoded))
        except DamagedImageError as damage:
            return damage

    with (
        oddities_ignored(),
        in_parallel(source.examples(split), decode, photos_a_chunk) as decoded,
    ):
        for done, (example, photo) in enumerate(decoded, start=1):
            if isinstance(photo, DamagedImageError):
                damaged.append((example.name, str(photo)))
            else:
                pixels.append(photo.pixels[np.newaxis])
                labels.append(example.label)
                names.append(example.name)
                digests.append(photo.digest)
            if on_progress:
                on_progress(done, count)
    return Examples(
        (pixels.finish(),),
        np.array(labels, np.int32),
        tuple(names),
        tuple(damaged),
        digests=tuple(digests),
    )


def digest_of(encoded: bytes) -> str:
    """Returns the beginning of the SHA-256 of a photo as it is stored.

    Not of its pixels: they may change a little with the version of the library that decodes them.
    """
    return hashlib.sha256(encoded).hexdigest()[:16]
