"""Your own source: photos as arrays, here squares and circles that are drawn in memory.

Flags: --source=examples/array_source.py:Shapes --backbone=SmallResNet --weights=none
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from research.data.source import Example, Source

COUNTS = {"train": 400, "validation": 50, "test": 50}
SIZE = 64


class Shapes(Source):
    """White shapes on grey, with random size and position."""

    class_names = ("circle", "square")

    def count(self, split: str) -> int:
        return COUNTS[split]

    def examples(self, split: str) -> Iterator[Example]:
        generator = np.random.default_rng(list(COUNTS).index(split))
        for index in range(COUNTS[split]):
            label = index % 2
            radius = generator.integers(8, 20)
            centre = generator.integers(20, SIZE - 20, size=2)
            down, right = np.abs(np.indices((SIZE, SIZE)) - centre[:, None, None])
            distance = np.hypot(down, right) if label == 0 else np.maximum(down, right)
            inside = distance < radius
            image = np.where(inside[..., None], 255, 100).astype(np.uint8).repeat(3, axis=2)
            yield Example(image, label, f"{split}/{index}")
