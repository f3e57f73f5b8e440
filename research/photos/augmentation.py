"""Changes training photos at random: crops, colours, mixtures; a pure function of numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

from research.photos.rand_augment import rand_augment

# What is drawn for an example and epoch: the places of the numbers that decide each thing.
# None is at place 0 any more: without it all others, and what earlier runs showed, would change.
CROP_AREA, CROP_RATIO, CROP_TOP, CROP_LEFT, FLIP = range(1, 6)
JITTER, RAND_AUGMENT = slice(6, 9), slice(9, 13)
PARTNER, IS_CUT, CUT_CORNER, PARTNER_SHARE = 13, 14, slice(15, 17), 17
DRAWS = 18

WIDEST_RATIO = 4 / 3

Numbers = Any  # a numpy array or a tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training photos are changed, in the order of the attributes.

    Keras's layers for this draw from a state of their own, some once for a whole batch; here the
    numbers are arguments, so that a run resumes exactly, batches and devices do not matter, and a
    cached view is the one that would have been computed.

    Attributes:
      rand_augment: magnitude of two random operations on the pixels, in [0, 10]; 0 for none.
      random_crop_area: show a part of at least this share of the area, in (0, 1], with sides of
        3:4 to 4:3 (Szegedy et al. 2014, arXiv 1409.4842); 1 for the whole.
      horizontal_flip: mirror left to right, one in two.
      colour_jitter: vary brightness, contrast and saturation by factors of up to 1 ± this, in
        [0, 1].
      mixup: parameter of the Beta distribution by which to blend a photo with another of the set
        (Zhang et al. 2018, arXiv 1710.09412); 0 for not.
      cutmix: the same to replace a box (Yun et al. 2019, arXiv 1905.04899).
    """

    rand_augment: float = 0.0
    random_crop_area: float = 1.0
    horizontal_flip: bool = False
    colour_jitter: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def epoch_draws(self, count: int, seed: int, epoch: int) -> np.ndarray:
        """Returns what decides how an epoch shows each example: float32 (count, DRAWS).

        An example's numbers follow from the seed, the epoch and its index, whatever the order, the
        batches and the devices. All are in [0, 1), but that at `PARTNER`, another example's index.
        """
        # The third number keeps these draws apart from those of the order.
        generator = np.random.default_rng([seed, epoch, 1])
        draws = generator.random((count, DRAWS), dtype=np.float32)
        if self.mixes:
            draws[:, PARTNER] = generator.integers(count, size=count)
            cuts = self.cuts(draws)
            strength = np.where(cuts, self.cutmix, self.mixup)
            share = generator.beta(strength, strength)
            # The photo itself is the larger part, so that its label is what accuracy counts.
            draws[:, PARTNER_SHARE] = np.minimum(share, 1 - share)
        return draws

    @property
    def views(self) -> int | None:
        """In how many ways a photo may be shown; None where there is no end of them."""
        if self != self.plain:
            return None
        return 2 if self.horizontal_flip else 1

    @property
    def plain(self) -> Augmentation:
        """What is left of it in a few views."""
        return Augmentation(horizontal_flip=self.horizontal_flip)

    @property
    def mixes(self) -> bool:
        """Whether photos are mixed with others."""
        return bool(self.mixup or self.cutmix)

    def cuts(self, draws: Numbers) -> Numbers:
        """Tells by draws, (..., DRAWS), where another photo comes as a box, not as a blend."""
        if self.mixup and self.cutmix:
            return draws[..., IS_CUT] < 0.5
        return draws[..., IS_CUT] < (1.0 if self.cutmix else 0.0)

    def view_of(self, draws: np.ndarray) -> np.ndarray:
        """Returns which of the views some draws, (..., DRAWS), choose: int64 in [0, views)."""
        mirrored = (draws[..., FLIP] < 0.5) if self.horizontal_flip else np.zeros(draws.shape[:-1])
        return mirrored.astype(np.int64)

    def draws_of(self, view: int) -> np.ndarray:
        """Returns draws, float32 (DRAWS,), that choose a view."""
        draws = np.zeros(DRAWS, np.float32)
        draws[FLIP] = 0.25 if view else 0.75
        return draws

    def apply(self, photos: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
        """Changes a batch, all but RandAugment and mixtures.

        Args:
          photos: float32 (batch, height, width, 3) in [0, 255].
          draws: float32 (batch, DRAWS) in [0, 1).

        Returns:
          Photos of the same shape and range.
        """
        if self.random_crop_area < 1:
            boxes = self._boxes(draws)
            size = tf.shape(photos)[1:3]
            cropped = tf.image.crop_and_resize(photos, boxes, tf.range(tf.shape(boxes)[0]), size)
            photos = tf.ensure_shape(cropped, photos.shape)
        if self.horizontal_flip:
            mirrored = draws[:, FLIP, tf.newaxis, tf.newaxis, tf.newaxis] < 0.5
            photos = tf.where(mirrored, tf.reverse(photos, [2]), photos)
        if self.colour_jitter:
            photos = self._jitter(photos, draws[:, JITTER])
        return photos

    def change_pixels(self, photos: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Applies RandAugment, before `apply`, to uint8 photos (batch, height, width, 3)."""
        if not self.rand_augment:
            return photos
        return np.stack(
            [
                rand_augment(photo, self.rand_augment, numbers[RAND_AUGMENT])
                for photo, numbers in zip(photos, draws, strict=True)
            ]
        )

    def mix(
        self, photos: tf.Tensor, partners: tf.Tensor, draws: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Mixes each photo with its partner, after `apply`.

        Args:
          photos: float32 (batch, height, width, 3).
          partners: of the same shape.
          draws: float32 (batch, DRAWS), of the photos.

        Returns:
          The mixtures, and the partner's share in each, float32 (batch,).
        """
        share = draws[:, PARTNER_SHARE]
        boxes = self._inside_box(share, draws[:, CUT_CORNER], photos.shape[1], photos.shape[2])
        blend = tf.broadcast_to(share[:, tf.newaxis, tf.newaxis, tf.newaxis], tf.shape(boxes))
        partly = tf.where(self.cuts(draws)[:, tf.newaxis, tf.newaxis, tf.newaxis], boxes, blend)
        # A box is a whole number of pixels high and wide: its true share counts.
        return photos + partly * (partners - photos), tf.reduce_mean(partly, axis=(1, 2, 3))

    def _inside_box(
        self, share: tf.Tensor, corner: tf.Tensor, height: int, width: int
    ) -> tf.Tensor:
        """Returns 1 inside a box with this share of the area, 0 outside: (batch, h, w, 1)."""
        sides = []
        for size, drawn in ((height, corner[:, 0]), (width, corner[:, 1])):
            length = tf.round(tf.sqrt(share) * size)
            begin = tf.floor(drawn * (size - length + 1))
            place = tf.range(size, dtype=tf.float32)[tf.newaxis]
            within = (place >= begin[:, tf.newaxis]) & (place < (begin + length)[:, tf.newaxis])
            sides.append(tf.cast(within, tf.float32))
        rows, columns = sides
        return rows[:, :, tf.newaxis, tf.newaxis] * columns[:, tf.newaxis, :, tf.newaxis]

    def _boxes(self, draws: tf.Tensor) -> tf.Tensor:
        """Returns the parts to show, (batch, 4): top, left, bottom, right in shares."""
        area = 1 - draws[:, CROP_AREA] * (1 - self.random_crop_area)
        # A large part is nearly a square: neither side can be longer than the photo's.
        ratio = tf.minimum(WIDEST_RATIO, 1 / area) ** (2 * draws[:, CROP_RATIO] - 1)
        height, width = tf.sqrt(area / ratio), tf.sqrt(area * ratio)
        top, left = draws[:, CROP_TOP] * (1 - height), draws[:, CROP_LEFT] * (1 - width)
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
