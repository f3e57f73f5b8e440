"""Changes training photos at random: mirror image, crops, colours; a pure function of numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
import tensorflow as tf

DRAWS = 9  # numbers drawn for an example and epoch; what each is for: see `Augmentation`

# The whole photo, its centre and its corners, as (top, left, bottom, right) in shares of it.
FIXED_CROPS = np.array(
    [
        (0, 0, 1, 1),
        (1 / 16, 1 / 16, 15 / 16, 15 / 16),
        (0, 0, 7 / 8, 7 / 8),
        (0, 1 / 8, 7 / 8, 1),
        (1 / 8, 0, 1, 7 / 8),
        (1 / 8, 1 / 8, 1, 1),
    ],
    np.float32,
)
WIDEST_RATIO = 4 / 3


def epoch_draws(count: int, seed: int, epoch: int) -> np.ndarray:
    """Returns what decides how an epoch shows each example: float32 (count, DRAWS) in [0, 1).

    An example's numbers follow from the seed, the epoch and its index, whatever the order, the
    batches and the devices.
    """
    # The third number keeps these draws apart from those of the order.
    generator = np.random.default_rng([seed, epoch, 1])
    return generator.random((count, DRAWS), dtype=np.float32)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How training photos are changed, in the order of the attributes.

    Keras's layers for this draw from a state of their own; here the numbers are arguments, so that
    a run resumes exactly and a cached view is the one that would have been computed.

    Attributes:
      fixed_crops: show the whole photo or one of five crops of it, 7/8 as high and wide (draw 0).
      random_crop_area: show a part of at least this share of the area, in (0, 1], with sides of
        3:4 to 4:3 (Szegedy et al. 2014, arXiv 1409.4842; draws 1 to 4); None for the whole.
      horizontal_flip: mirror left to right, one in two (draw 5).
      colour_jitter: vary brightness, contrast and saturation by factors of up to 1 ± this, in
        [0, 1] (draws 6 to 8).
    """

    fixed_crops: bool = False
    random_crop_area: float | None = None
    horizontal_flip: bool = False
    colour_jitter: float = 0.0

    @property
    def views(self) -> int | None:
        """In how many ways a photo may be shown; None where there is no end of them."""
        if self.random_crop_area is not None or self.colour_jitter:
            return None
        return (len(FIXED_CROPS) if self.fixed_crops else 1) * (2 if self.horizontal_flip else 1)

    def view_of(self, draws: np.ndarray) -> np.ndarray:
        """Returns which of the views some draws, (..., DRAWS), choose: int64 in [0, views)."""
        crops = len(FIXED_CROPS) if self.fixed_crops else 1
        crop = (draws[..., 0] * crops).astype(np.int64)
        return 2 * crop + (draws[..., 5] < 0.5) if self.horizontal_flip else crop

    def draws_of(self, view: int) -> np.ndarray:
        """Returns draws, float32 (DRAWS,), that choose a view."""
        draws = np.zeros(DRAWS, np.float32)
        crop, mirrored = divmod(view, 2) if self.horizontal_flip else (view, 1)
        draws[0] = (crop + 0.5) / len(FIXED_CROPS)
        draws[5] = 0.25 if mirrored else 0.75
        return draws

    def apply(self, photos: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
        """Changes a batch.

        Args:
          photos: float32 (batch, height, width, 3) in [0, 255].
          draws: float32 (batch, DRAWS) in [0, 1).

        Returns:
          Photos of the same shape and range.
        """
        if self.fixed_crops or self.random_crop_area is not None:
            boxes = self._boxes(draws)
            size = tf.shape(photos)[1:3]
            cropped = tf.image.crop_and_resize(photos, boxes, tf.range(tf.shape(boxes)[0]), size)
            photos = tf.ensure_shape(cropped, photos.shape)
        if self.horizontal_flip:
            mirrored = draws[:, 5, tf.newaxis, tf.newaxis, tf.newaxis] < 0.5
            photos = tf.where(mirrored, tf.reverse(photos, [2]), photos)
        if self.colour_jitter:
            photos = self._jitter(photos, draws[:, 6:9])
        return photos

    def _boxes(self, draws: tf.Tensor) -> tf.Tensor:
        """Returns the parts to show, (batch, 4): top, left, bottom, right in shares."""
        if self.random_crop_area is None:
            return tf.gather(FIXED_CROPS, tf.cast(draws[:, 0] * len(FIXED_CROPS), tf.int32))
        area = 1 - draws[:, 1] * (1 - self.random_crop_area)
        # A large part is nearly a square: neither side can be longer than the photo's.
        ratio = tf.minimum(WIDEST_RATIO, 1 / area) ** (2 * draws[:, 2] - 1)
        height, width = tf.sqrt(area / ratio), tf.sqrt(area * ratio)
        top, left = draws[:, 3] * (1 - height), draws[:, 4] * (1 - width)
        return tf.stack([top, left, top + height, left + width], axis=1)

    def _jitter(self, photos: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
        factors = 1 + self.colour_jitter * (2 * draws[:, :, tf.newaxis, tf.newaxis] - 1)
        brightness, contrast, saturation = (
            factors[:, index, :, :, tf.newaxis] for index in range(3)
        )
        photos = tf.clip_by_value(photos * brightness, 0, 255)
        mean = tf.reduce_mean(tf.image.rgb_to_grayscale(photos), axis=(1, 2), keepdims=True)
        photos = tf.clip_by_value(mean + (photos - mean) * contrast, 0, 255)
        grey = tf.image.rgb_to_grayscale(photos)
        return tf.clip_by_value(grey + (photos - grey) * saturation, 0, 255)
