"""Finds photos that are the same or look alike, from their fingerprints."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEAST_CORRELATION = 0.9  # of two thumbnails: copies have it, different photos hardly ever
LEAST_DEVIATION = 2.0  # of a thumbnail's shades, of 256: what is plainer has no look to compare
BLOCK = 256  # photos compared with all others at a time
PAIRS_AT_MOST = 100_000


class Pair(NamedTuple):
    """Two photos that look alike, by index, and how many bits of their hashes differ."""

    first: int
    second: int
    distance: int


def equal_groups(digests: Sequence[str]) -> list[tuple[int, ...]]:
    """Returns the indices of each digest that occurs, in the order in which they first occur."""
    groups: dict[str, list[int]] = collections.defaultdict(list)
    for index, digest in enumerate(digests):
        groups[digest].append(index)
    return [tuple(group) for group in groups.values()]


def similar_pairs(looks: np.ndarray, thumbnails: np.ndarray, distance: int) -> list[Pair]:
    """Returns the pairs of photos that look alike, at most `PAIRS_AT_MOST`.

    Their hashes differ in few bits, and their thumbnails are correlated: either alone confuses
    some drawings or plain photos.

    Args:
      looks: uint64 (photos, words), perceptual hashes.
      thumbnails: uint8 (photos, pixels).
      distance: how many bits may differ.
    """
    shades = thumbnails.astype(np.float32)
    shades -= shades.mean(axis=1, keepdims=True)
    least_norm = LEAST_DEVIATION * thumbnails.shape[1] ** 0.5
    norms = np.linalg.norm(shades, axis=1, keepdims=True)
    # A plain thumbnail becomes zeros, which are correlated with nothing.
    shades = np.where(norms >= least_norm, shades / np.maximum(norms, least_norm), 0)
    pairs: list[Pair] = []
    for start in range(0, len(looks), BLOCK):
        # One product of matrices; the bits are counted for the few pairs that it leaves.
        correlations = shades[start : start + BLOCK] @ shades[start:].T
        rows, columns = np.nonzero(np.triu(correlations >= LEAST_CORRELATION, 1))
        first, second = start + rows, start + columns
        differing = np.bitwise_count(looks[first] ^ looks[second]).sum(axis=1, dtype=np.int64)
        near = differing <= distance
        pairs += map(Pair._make, np.stack([first, second, differing], axis=1)[near].tolist())
        if len(pairs) >= PAIRS_AT_MOST:
            break
    return pairs[:PAIRS_AT_MOST]
