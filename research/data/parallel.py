"""Work on stored photos on all processors, with a few of them in memory at a time."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from research.data.source import Example
from research.system.machine import processors

Result = TypeVar("Result")

CHUNK_BYTES = 2**23  # of stored photos that a thread takes at a time


@contextlib.contextmanager
def in_parallel(
    examples: Iterator[Example],
    work: Callable[[Example], Result],
    photos_a_chunk: int = 32,
) -> Iterator[Iterator[tuple[Example, Result]]]:
    """Gives an iterator over each photo and what a function makes of it, in order.

    The threads end with the `with` block. If they ended with a generator, Python could collect it
    in one of them, which cannot wait for itself.

    Args:
      examples: what is read in this thread, a little ahead.
      work: called in other threads, several at a time.
      photos_a_chunk: handed to a thread together, as handing over one by one costs; fewer where
        they are large.
    """

    workers = processors()
    pool = ThreadPoolExecutor(workers)
    try:
        yield _in_order(pool, _chunks(examples, photos_a_chunk), work, 2 * workers)
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ThreadPoolExecutor,
    chunks: Iterator[list[Example]],
    work: Callable[[Example], Result],
    chunks_ahead: int,
) -> Iterator[tuple[Example, Result]]:
    def work_on(chunk: list[Example]) -> list[Result]:
        return [work(example) for example in chunk]

    waiting: collections.deque[tuple[list[Example], Future[list[Result]]]]
    waiting = collections.deque()
    for chunk in chunks:
        waiting.append((chunk, pool.submit(work_on, chunk)))
        if len(waiting) > chunks_ahead:
            first, results = waiting.popleft()
            yield from zip(first, results.result(), strict=True)
    while waiting:
        first, results = waiting.popleft()
        yield from zip(first, results.result(), strict=True)


def _chunks(examples: Iterator[Example], photos_a_chunk: int) -> Iterator[list[Example]]:
    chunk: list[Example] = []
    size = 0
    for example in examples:
        chunk.append(example)
        size += 0 if example.image is None else np.asarray(example.image).nbytes
        if len(chunk) >= photos_a_chunk or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
