"""Processes photos in several threads, with few of them in memory at a time."""

from __future__ import annotations

import collections
import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from research.data.decode import DamagedImageError
from research.data.source import Example
from research.system.machine import processors

CHUNK_BYTES = 2**23  # a chunk of stored photos ends when it reaches this size

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextlib.contextmanager
def pillow_warnings_hidden() -> Iterator[None]:
    """Hides Pillow's warnings about unusual but readable photos, in all threads of the process.

    The warning filters are global, so open this context in one thread only.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Iterator[Iterator[tuple[Item, Result]]]:
    """Gives an iterator over the items and the results of `work`, in order.

    The threads end with the `with` block. If they ended with a generator, Python could collect the
    generator in one of its own threads, which cannot wait for itself.

    Args:
      work: called in several threads at once.
      items: read in this thread, at most two more than there are threads ahead of the results.
      threads: number of threads. With one, `work` is called in this thread.
    """
    if threads == 1:
        yield ((item, work(item)) for item in items)
        return

    def results() -> Iterator[tuple[Item, Result]]:
        submitted = ((item, pool.submit(work, item)) for item in items)
        waiting = collections.deque(itertools.islice(submitted, threads + 1))
        while waiting:
            item, result = waiting.popleft()
            waiting.extend(itertools.islice(submitted, 1))
            yield item, result.result()

    pool = ThreadPoolExecutor(threads)
    try:
        yield results()
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def in_parallel(
    examples: Iterator[Example],
    work: Callable[[int, bytes | np.ndarray], Result],
    photos_per_chunk: int = 32,
) -> Iterator[Iterator[tuple[int, Example, Result | DamagedImageError]]]:
    """Gives an iterator over the index, the example and the result of `work`, in order.

    Args:
      examples: read in this thread, a few chunks ahead of the results.
      work: called in several threads at once, with the index of an example, from 0, and its
        image. If it raises `DamagedImageError`, or the image cannot be read, the error is the
        result.
      photos_per_chunk: photos that a thread takes at a time. A chunk is smaller if its photos are
        large.
    """

    def work_on(chunk: list[tuple[int, Example]]) -> list[Result | DamagedImageError]:
        results: list[Result | DamagedImageError] = []
        for index, example in chunk:
            try:
                if example.image is None:
                    raise DamagedImageError(example.problem)
                results.append(work(index, example.image))
            except DamagedImageError as damage:
                results.append(damage)
        return results

    chunks = _chunks(enumerate(examples), photos_per_chunk)
    with pillow_warnings_hidden(), in_order(work_on, chunks, processors()) as worked:
        yield (
            (index, example, result)
            for chunk, results in worked
            for (index, example), result in zip(chunk, results, strict=True)
        )


def _chunks(
    examples: Iterator[tuple[int, Example]], photos_per_chunk: int
) -> Iterator[list[tuple[int, Example]]]:
    chunk: list[tuple[int, Example]] = []
    size = 0
    for index, example in examples:
        chunk.append((index, example))
        image = b"" if example.image is None else example.image
        size += len(image) if isinstance(image, bytes) else image.nbytes
        if len(chunk) >= photos_per_chunk or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
