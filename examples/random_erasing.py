"""Random erasing: a grey box in half of the photos (Zhong et al. 2017, arXiv 1708.04896).

Flag: --augmentation=examples/random_erasing.py:RandomErasing
"""

from __future__ import annotations

import tensorflow as tf

from research.data.augmentation import Augmentation

LARGEST = 0.5  # largest side of the box, as a share of the photo's side
GREY = 127.5


class RandomErasing(Augmentation):
    """The five random numbers of a photo select: erase or not, height, width, top, left."""

    numbers = 5

    def apply(self, photos: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
        height, width = photos.shape[1:3]
        rows = self._inside(height, numbers[:, 1], numbers[:, 3])[:, :, tf.newaxis, tf.newaxis]
        columns = self._inside(width, numbers[:, 2], numbers[:, 4])[:, tf.newaxis, :, tf.newaxis]
        erased = numbers[:, 0, tf.newaxis, tf.newaxis, tf.newaxis] < 0.5
        return tf.where(erased & rows & columns, GREY, photos)

    def _inside(self, size: int, length: tf.Tensor, begin: tf.Tensor) -> tf.Tensor:
        """Returns whether the box covers each row or column, bool (batch, size)."""
        share = LARGEST * length
        first = begin * (1 - share)
        place = (tf.range(size, dtype=tf.float32) + 0.5) / size
        last = (first + share)[:, tf.newaxis]
        return (place >= first[:, tf.newaxis]) & (place < last)
