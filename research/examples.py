"""Photos in the form that training wants: decoded once, resized, in one array, found by index."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from research.decode import DamagedImageError, decode_image
from research.machine import processors
from research.rows import rows_of_size
from research.sources import EncodedExample, Source

CHUNK_BYTES = 2**21  # of pixels that a thread makes at a time: handing over photos one by one costs


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
    """

    inputs: tuple[np.ndarray, ...]
    labels: np.ndarray
    names: tuple[str, ...]
    damaged: tuple[tuple[str, str], ...] = ()
    views: int = 1

    def __len__(self) -> int:
        return len(self.labels)


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
    damaged: list[tuple[str, str]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of oddities in photos that it reads well
        for done, (example, photo) in enumerate(_decoded(source.examples(split), size), start=1):
            if isinstance(photo, DamagedImageError):
                damaged.append((example.name, str(photo)))
            else:
                pixels.append(photo[np.newaxis])
                labels.append(example.label)
                names.append(example.name)
            if on_progress:
                on_progress(done, count)
    return Examples((pixels.finish(),), np.array(labels, np.int32), tuple(names), tuple(damaged))


def _decoded(
    examples: Iterator[EncodedExample], size: int
) -> Iterator[tuple[EncodedExample, np.ndarray | DamagedImageError]]:
    """Decodes in parallel and yields in order, holding only a few photos at a time."""

    def decode(chunk: list[EncodedExample]) -> list[np.ndarray | DamagedImageError]:
        return [_decode(example.encoded, size) for example in chunk]

    workers = processors()
    size_of_chunk = max(1, min(CHUNK_BYTES // (3 * size * size), 32))
    waiting: collections.deque[
        tuple[list[EncodedExample], Future[list[np.ndarray | DamagedImageError]]]
    ] = collections.deque()
    with ThreadPoolExecutor(workers) as pool:
        while chunk := list(itertools.islice(examples, size_of_chunk)):
            waiting.append((chunk, pool.submit(decode, chunk)))
            if len(waiting) > 2 * workers:
                first, photos = waiting.popleft()
                yield from zip(first, photos.result(), strict=True)
        for first, photos in waiting:
            yield from zip(first, photos.result(), strict=True)


def _decode(encoded: bytes | None, size: int) -> np.ndarray | DamagedImageError:
    try:
        return decode_image(encoded, size)
    except DamagedImageError as damage:
        return damage
