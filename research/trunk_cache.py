"""Runs the frozen trunk once for each photo instead of once in every epoch."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping

import numpy as np
import psutil
import tensorflow as tf
import tqdm

from research.batches import Preprocessing, make_batches
from research.config import TrainConfig
from research.examples import Examples, allocate
from research.split import Activations, SplitBackbone


@dataclasses.dataclass(frozen=True)
class CacheDecision:
    """Whether the trunk is cached, and why, in one line."""

    use: bool
    reason: str


def bytes_a_photo(parts: SplitBackbone) -> int:
    """Returns how much the trunk's activations for one photo take."""
    if parts.trunk is None:
        return 0
    return sum(
        int(np.prod(tensor.shape[1:])) * tf.as_dtype(tensor.dtype).size
        for tensor in parts.trunk.outputs
    )


def decide(config: TrainConfig, parts: SplitBackbone, photos: int, visits: float) -> CacheDecision:
    """Decides whether to cache.

    Args:
      config: its `trunk_cache` is obeyed if `memory` or `off`; `auto` caches where it pays and
        fits.
      parts: the backbone, cut below the first trainable layer.
      photos: how many photos of all splits would be cached.
      visits: how often training looks at each of its photos.
    """
    setting = config.trunk_cache
    if setting == "off":
        return CacheDecision(False, "off, as asked")
    if config.horizontal_flip:
        return CacheDecision(False, "off: photos are mirrored by chance")
    if parts.trunk is None:
        return CacheDecision(False, "off: no layer is frozen")
    size = photos * bytes_a_photo(parts)
    amount = f"{size / 1e6:,.0f} MB for {photos:,} photos"
    if setting == "auto" and visits < 1.5:
        return CacheDecision(False, f"off: photos are seen {visits:.1f} times, too few to pay")
    available = psutil.virtual_memory().available
    if setting == "auto" and size > available // 2:
        half = f"half of the free {available / 1e6:,.0f} MB"
        return CacheDecision(False, f"off: {amount} would take more than {half}")
    place = "in memory" if size <= available // 2 else "on disk"
    return CacheDecision(True, f"{place}, {amount}: the frozen layers run once")


def cache_trunk(
    parts: SplitBackbone,
    splits: Mapping[str, Examples],
    preprocessing: Preprocessing | None,
    batch_size: int,
) -> dict[str, Examples]:
    """Returns the splits with the trunk's activations instead of their photos."""
    run = tf.function(parts.activations, reduce_retracing=True)
    with tqdm.tqdm(
        desc="running the frozen layers",
        total=sum(map(len, splits.values())),
        unit=" photos",
        leave=False,
        ncols=79,
        disable=not sys.stderr.isatty(),
    ) as bar:
        return {
            name: _cache_split(run, examples, preprocessing, batch_size, bar)
            for name, examples in splits.items()
        }


def _cache_split(
    run: Callable[[tf.Tensor], Activations],
    examples: Examples,
    preprocessing: Preprocessing | None,
    batch_size: int,
    bar: tqdm.tqdm,
) -> Examples:
    arrays: list[np.ndarray] = []
    done = 0
    for batch in make_batches(examples, np.arange(len(examples)), batch_size, preprocessing):
        activations = [tensor.numpy() for tensor in run(batch["image"])]
        if not arrays:
            arrays = [allocate((len(examples), *a.shape[1:]), a.dtype) for a in activations]
        count = len(activations[0])
        for array, values in zip(arrays, activations, strict=True):
            array[done : done + count] = values
        done += count
        bar.update(count)
    return dataclasses.replace(examples, inputs=tuple(arrays))
