"""Frees reference cycles soon, and keeps Python's garbage collector from searching in vain."""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Iterator


@contextlib.contextmanager
def collected() -> Iterator[None]:
    """Frees at its end the garbage of objects created in the block.

    Each tf.data pipeline leaves a few hundred Python objects in reference cycles, which hold much
    more TensorFlow memory. Python collects old objects only when new objects exceed a quarter of
    them, and TensorFlow and Keras have 400,000. Older objects are skipped here, so that a
    collection takes milliseconds.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()


def release(error: Exception) -> None:
    """Frees the input pipeline that raised an error, which the frames of its traceback hold.

    If the collector did this later, it could do it in a thread of the same pipeline that runs
    Python code. TensorFlow would then wait for this thread in this thread, without end.
    """
    traceback.clear_frames(error.__traceback__)
    gc.collect()


@contextlib.contextmanager
def not_searched() -> Iterator[None]:
    """Keeps Python's collector from searching the objects created in the block for garbage.

    It would search a million photos again and again, which takes longer than to create them. They
    are searched from the end of the next `collected` block on.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
        gc.freeze()
