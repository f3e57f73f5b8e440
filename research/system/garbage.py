"""Frees reference cycles, which Python's garbage collector would keep for long."""

from __future__ import annotations

import contextlib
import gc
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
