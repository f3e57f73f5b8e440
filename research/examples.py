"""Photos in the form that training wants: decoded once, resized, in one array, found by index."""

from __future__ import annotations

import collections
import dataclasses
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import psutil

from research.decode import DamagedImageError, decode_image
from research.sources import EncodedExample, Source


@dataclasses.dataclass(frozen=True)
class Examples:
    """A split, ready to be drawn from.

    Attributes:
      inputs: what the model takes; arrays of shape (examples, ...). For photos one array of uint8
        RGB (examples, size, size, 3); for a cached trunk its activations, one or several.
      labels: int32 (examples,), class indices.
      names: a name for each example, for people.
      damaged: the names and reasons of those that could not be decoded, and are left out.
    """

    inputs: tuple[np.ndarray, ...]
    labels: np.ndarray
    names: tuple[str, ...]
    damaged: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.labels)


def allocate(shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
    """Returns an array in memory if it takes less than half of what is free, else on disk.

    The file has no name: it goes with the process, however that ends.
    """
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if size <= psutil.virtual_memory().available // 2:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype, "w+", shape=shape)


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
    pixels = allocate((count, size, size, 3), np.uint8)
    labels = np.empty(count, np.int32)
    names: list[str] = []
    damaged: list[tuple[str, str]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of oddities in photos that it reads well
        for done, (example, photo) in enumerate(_decoded(source.examples(split), size), start=1):
            if isinstance(photo, DamagedImageError):
                damaged.append((example.name, str(photo)))
            else:
                pixels[len(names)] = photo
                labels[len(names)] = example.label
                names.append(example.name)
            if on_progress:
                on_progress(done, count)
    usable = len(names)
    return Examples((pixels[:usable],), labels[:usable], tuple(names), tuple(damaged))


def _decoded(
    examples: Iterator[EncodedExample], size: int
) -> Iterator[tuple[EncodedExample, np.ndarray | DamagedImageError]]:
    """Decodes in parallel and yields in order, holding only a few photos at a time."""

    def decode(encoded: bytes | None) -> np.ndarray | DamagedImageError:
        try:
            return decode_image(encoded, size)
        except DamagedImageError as damage:
            return damage

    workers = os.cpu_count() or 1
    waiting: collections.deque[tuple[EncodedExample, Future[np.ndarray | DamagedImageError]]]
    waiting = collections.deque()
    with ThreadPoolExecutor(workers) as pool:
        for example in examples:
            waiting.append((example, pool.submit(decode, example.encoded)))
            if len(waiting) >= 8 * workers:
                first, photo = waiting.popleft()
                yield first, photo.result()
        for first, photo in waiting:
            yield first, photo.result()
