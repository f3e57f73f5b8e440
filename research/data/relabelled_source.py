"""Photos of another source with the labels of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from research.data.source import Example, Source


class RelabelledSource(Source):
    """The photos of a source, whose class names are some of those of a run, in any order.

    A label is a class index, or an array with a 0 or 1 per class of the source; the classes that
    the source lacks get 0. Other labels are kept.

    Args:
      source: the photos.
      class_names: all class names of the run, in the order of their labels.
    """

    def __init__(self, source: Source, class_names: tuple[str, ...]) -> None:
        self.class_names = class_names
        self._source = source
        self.random_access = source.random_access
        labels = {name: label for label, name in enumerate(class_names)}
        self._labels = [labels[name] for name in source.class_names]

    def count(self, split: str) -> int:
        return self._source.count(split)

    def examples(self, split: str) -> Iterator[Example]:
        for example in self._source.examples(split):
            yield example._replace(label=self._relabelled(example.label))

    def origin(self, split: str) -> str | None:
        origin = self._source.origin(split)
        return origin and f"{origin} {self._labels} of {len(self.class_names)}"

    def listed(self, split: str) -> list[Example]:
        return [
            example._replace(label=self._relabelled(example.label))
            for example in self._source.listed(split)
        ]

    def read(self, split: str, index: int) -> Example:
        example = self._source.read(split, index)
        return example._replace(label=self._relabelled(example.label))

    def _relabelled(self, label: Any) -> Any:
        given = np.asarray(label)
        if given.dtype.kind in "iu" and given.ndim == 0:
            return self._labels[int(given)]
        if given.dtype.kind in "iub" and given.shape == (len(self._labels),):
            placed = np.zeros(len(self.class_names), np.int32)
            placed[self._labels] = given
            return placed
        return label
