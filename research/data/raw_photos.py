"""Random photos in their original size, for display."""

from __future__ import annotations

import contextlib

import numpy as np

from research.data.decode import DamagedImageError, decode_image
from research.data.source import Source, counted
from research.data.thread_pool import pillow_warnings_hidden


def random_raw_images(
    source: Source, n: int, first: int, seed: int
) -> list[tuple[np.ndarray, int]]:
    """Returns random training photos in their original size, as pairs (uint8 RGB, label).

    Args:
      source: where the photos come from.
      n: the number of photos. The result is shorter if fewer photos are usable.
      first: number of photos at the beginning of the split to choose from.
      seed: decides which photos are chosen.

    Raises:
      UserError: the source yields fewer photos than its count.
    """
    count = source.count("train")
    order = np.random.default_rng([seed, n]).permutation(min(first, count)).tolist()
    drawn: list[tuple[np.ndarray, int]] = []
    # A thousand full-size photos take gigabytes, so more photos are read only if needed.
    tried = 2 * n
    while order and len(drawn) < n:
        places, order = order[:tried], order[tried:]
        examples = counted(source.examples("train"), count)
        stored = zip(range(max(places) + 1), examples, strict=False)
        found = {place: example for place, example in stored if place in places}
        for place in places:
            with contextlib.suppress(DamagedImageError), pillow_warnings_hidden():
                if len(drawn) < n:
                    drawn.append((decode_image(found[place].image), found[place].label))
        tried *= 4
    return drawn
