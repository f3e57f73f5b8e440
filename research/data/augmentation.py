"""Augmentation: random changes of training photos, each a pure function of its own numbers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from research.data.rand_augment import rand_augment
from research.system.errors import UserError

WIDEST_RATIO = 4 / 3

Numbers = Any  # a NumPy array or a tensor


class Augmentation:
    """One random change of training photos. Subclass it in a file of your own.

    Give the subclass with `--augmentation=FILE.py:Class`. Keras's augmentation layers draw from a
    state of their own, some once for a whole batch. Here the random numbers are arguments, which
    follow from the run's seed, the augmentation's name, the epoch and the photo. So a run resumes
    exactly, batches and devices do not matter, and one augmentation more changes no other.

    Attributes:
      name: of its stream of random numbers, and in messages; by default the class's name.
      numbers: how many random numbers it takes for each photo and epoch.
      views: how many different results a photo has; None if they cannot be counted. What the
        frozen layers compute can be cached for a few views only.
    """

    name: str = "Augmentation"
    numbers: ClassVar[int] = 0
    views: ClassVar[int | None] = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in vars(cls):
            cls.name = cls.__name__

    def draw(self, generator: np.random.Generator, photos: int) -> np.ndarray:
        """Returns the random numbers of an epoch, float32 (photos, numbers); in [0, 1)."""
        return generator.random((photos, self.numbers), dtype=np.float32)

    def change_pixels(self, photos: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Changes uint8 photos (batch, height, width, 3) with NumPy, before any `apply`.

        Args:
          photos: not to be written to.
          numbers: float32 (batch, numbers).
        """
        return photos

    def apply(self, photos: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
        """Changes a batch, as a part of the input pipeline's graph.

        Args:
          photos: float32 (batch, height, width, 3) in [0, 255].
          numbers: float32 (batch, numbers).

        Returns:
          Photos of the same shape and range.
        """
        return photos

    def view_of(self, numbers: np.ndarray) -> np.ndarray:
        """Returns which view some numbers, (..., numbers), choose: int64 in [0, views)."""
        return np.zeros(numbers.shape[:-1], np.int64)

    def numbers_of(self, view: int) -> np.ndarray:
        """Returns numbers, float32 (numbers,), that choose a view."""
        return np.zeros(self.numbers, np.float32)


class RandAugment(Augmentation):
    """Two random operations on the pixels (Cubuk et al. 2019, arXiv 1909.13719).

    Args:
      magnitude: in [0, 10], the strongest.
    """

    name = "rand_augment"
    numbers = 4

    def __init__(self, magnitude: float) -> None:
        self.magnitude = magnitude

    def change_pixels(self, photos: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        return np.stack(
            [
                rand_augment(photo, self.magnitude, drawn)
                for photo, drawn in zip(photos, numbers, strict=True)
            ]
        )


class RandomCrop(Augmentation):
    """Shows a part of each photo, with sides of 3:4 to 4:3 (Szegedy et al. 2014, arXiv 1409.4842).

    Args:
      least_area: the least share of the photo's area, in (0, 1].
    """

    name = "random_crop_area"
    numbers = 4

    def __init__(self, least_area: float) -> None:
        self.least_area = least_area

    def apply(self, photos: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
        boxes = self.boxes(numbers)
        size = tf.shape(photos)[1:3]
        cropped = tf.image.crop_and_resize(photos, boxes, tf.range(tf.shape(boxes)[0]), size)
        return tf.ensure_shape(cropped, photos.shape)

    def boxes(self, numbers: tf.Tensor) -> tf.Tensor:
        """Returns the parts to show, (batch, 4): top, left, bottom, right, as shares in [0, 1]."""
        area = 1 - numbers[:, 0] * (1 - self.least_area)
        # A large part is nearly a square: neither side can be longer than the photo's.
        ratio = tf.minimum(WIDEST_RATIO, 1 / area) ** (2 * numbers[:, 1] - 1)
        height, width = tf.sqrt(area / ratio), tf.sqrt(area * ratio)
        top, left = numbers[:, 2] * (1 - height), numbers[:, 3] * (1 - width)
        return tf.stack([top, left, top + height, left + width], axis=1)


class HorizontalFlip(Augmentation):
    """Mirrors one photo in two left to right."""

    name = "horizontal_flip"
    numbers = 1
    views = 2

    def apply(self, photos: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
        mirrored = numbers[:, 0, tf.newaxis, tf.newaxis, tf.newaxis] < 0.5
        return tf.where(mirrored, tf.reverse(photos, [2]), photos)

    def view_of(self, numbers: np.ndarray) -> np.ndarray:
        return (numbers[..., 0] < 0.5).astype(np.int64)

    def numbers_of(self, view: int) -> np.ndarray:
        return np.array([0.25 if view else 0.75], np.float32)


class ColourJitter(Augmentation):
    """Varies brightness, contrast and saturation.

    Args:
      strength: each is multiplied by a factor in 1 ± this, in [0, 1].
    """

    name = "colour_jitter"
    numbers = 3

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def apply(self, photos: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
        factors = 1 + self.strength * (2 * numbers[:, :, tf.newaxis, tf.newaxis] - 1)
        brightness, contrast, saturation = (
            factors[:, index, :, :, tf.newaxis] for index in range(3)
        )
        photos = tf.clip_by_value(photos * brightness, 0, 255)
        mean = tf.reduce_mean(tf.image.rgb_to_grayscale(photos), axis=(1, 2), keepdims=True)
        photos = tf.clip_by_value(mean + (photos - mean) * contrast, 0, 255)
        grey = tf.image.rgb_to_grayscale(photos)
        return tf.clip_by_value(grey + (photos - grey) * saturation, 0, 255)


class Mixing(Augmentation):
    """Mixes each photo and its label with another photo of the training split.

    With both parameters, one of the two ways is chosen for each photo at random.

    Args:
      mixup: parameter of the Beta distribution of the share by which to blend two photos (Zhang
        et al. 2018, arXiv 1710.09412); 0 for never.
      cutmix: the same for the share of a box that is replaced (Yun et al. 2019, arXiv 1905.04899).
    """

    # The columns of the numbers: the other photo's index, which way, the box, the other's share.
    PARTNER, IS_CUT, CORNER, SHARE = 0, 1, slice(2, 4), 4
    numbers = 5

    def __init__(self, mixup: float = 0.0, cutmix: float = 0.0) -> None:
        self.mixup = mixup
        self.cutmix = cutmix
        self.name = "mixup" if mixup else "cutmix"

    def draw(self, generator: np.random.Generator, photos: int) -> np.ndarray:
        drawn = super().draw(generator, photos)
        drawn[:, self.PARTNER] = generator.integers(photos, size=photos)
        strength = np.where(self.cuts(drawn), self.cutmix, self.mixup)
        share = generator.beta(strength, strength)
        # The photo itself is the larger part, so that its label is what accuracy counts.
        drawn[:, self.SHARE] = np.minimum(share, 1 - share)
        return drawn

    def cuts(self, numbers: Numbers) -> Numbers:
        """Tells by numbers, (..., numbers), where a box is replaced instead of blending."""
        if self.mixup and self.cutmix:
            return numbers[..., self.IS_CUT] < 0.5
        return numbers[..., self.IS_CUT] < (1.0 if self.cutmix else 0.0)

    def partners(self, numbers: tf.Tensor) -> tf.Tensor:
        """Returns the indices of the other photos, int64 (batch,)."""
        return tf.cast(numbers[:, self.PARTNER], tf.int64)

    def mix(
        self, photos: tf.Tensor, partners: tf.Tensor, numbers: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Mixes each photo with its partner, after every `apply`.

        Args:
          photos: float32 (batch, height, width, 3).
          partners: of the same shape.
          numbers: float32 (batch, numbers), of the photos.

        Returns:
          The mixtures, and the partner's share in each, float32 (batch,).
        """
        share = numbers[:, self.SHARE]
        boxes = _inside_box(share, numbers[:, self.CORNER], photos.shape[1], photos.shape[2])
        blend = tf.broadcast_to(share[:, tf.newaxis, tf.newaxis, tf.newaxis], tf.shape(boxes))
        partly = tf.where(self.cuts(numbers)[:, tf.newaxis, tf.newaxis, tf.newaxis], boxes, blend)
        # A box is a whole number of pixels high and wide: its true share counts.
        return photos + partly * (partners - photos), tf.reduce_mean(partly, axis=(1, 2, 3))


def _inside_box(share: tf.Tensor, corner: tf.Tensor, height: int, width: int) -> tf.Tensor:
    """Returns 1 inside a box with this share of the area, 0 outside: (batch, height, width, 1)."""
    sides = []
    for size, drawn in ((height, corner[:, 0]), (width, corner[:, 1])):
        length = tf.round(tf.sqrt(share) * size)
        begin = tf.floor(drawn * (size - length + 1))
        place = tf.range(size, dtype=tf.float32)[tf.newaxis]
        within = (place >= begin[:, tf.newaxis]) & (place < (begin + length)[:, tf.newaxis])
        sides.append(tf.cast(within, tf.float32))
    rows, columns = sides
    return rows[:, :, tf.newaxis, tf.newaxis] * columns[:, tf.newaxis, :, tf.newaxis]


class AugmentationPipeline:
    """Augmentations that are applied one after another; mixing comes last.

    Args:
      augmentations: at most one `Mixing`, and no two of one name.

    Raises:
      UserError: there are two of one name, whose random numbers would be the same, or two mixings.
    """

    def __init__(self, augmentations: Sequence[Augmentation] = ()) -> None:
        names = [augmentation.name for augmentation in augmentations]
        if len(set(names)) < len(names):
            raise UserError(
                f"augmentations are named {', '.join(names)}; expected each name once, as it "
                "decides the random numbers"
            )
        if sum(isinstance(one, Mixing) for one in augmentations) > 1:
            raise UserError(
                f"augmentations are {', '.join(names)}; expected at most one that mixes photos"
            )
        self.steps = [one for one in augmentations if not isinstance(one, Mixing)]
        self.mixing = next((one for one in augmentations if isinstance(one, Mixing)), None)

    def __bool__(self) -> bool:
        return bool(self.steps or self.mixing)

    def _with_columns(self) -> list[tuple[Augmentation, slice]]:
        """Returns each augmentation, and its columns in the table of all numbers."""
        begin, columns = 0, []
        for one in (*self.steps, *([self.mixing] if self.mixing else [])):
            columns.append((one, slice(begin, begin + one.numbers)))
            begin += one.numbers
        return columns

    @property
    def endless(self) -> str | None:
        """The name of an augmentation whose views cannot be counted; None if there is none."""
        return next((one.name for one, _ in self._with_columns() if one.views is None), None)

    @property
    def views(self) -> int | None:
        """How many different results a photo has; None if they cannot be counted."""
        if self.endless:
            return None
        return math.prod(one.views or 1 for one in self.steps)

    @property
    def countable(self) -> AugmentationPipeline:
        """Only the augmentations whose views can be counted."""
        return AugmentationPipeline([one for one in self.steps if one.views is not None])

    def draw(self, photos: int, seed: int, epoch: int) -> np.ndarray:
        """Returns the random numbers of an epoch for each photo, float32 (photos, numbers of all).

        Each augmentation has a generator of its own. A photo's numbers follow from its index, but
        not from the order, the batches and the devices.
        """
        tables = []
        for one, _ in self._with_columns():
            digest = hashlib.sha256(one.name.encode()).digest()
            # The third number keeps these draws apart from those of the order of photos.
            stream = np.random.default_rng([seed, epoch, 1, int.from_bytes(digest[:8], "big")])
            tables.append(one.draw(stream, photos).astype(np.float32))
        return np.concatenate([np.zeros((photos, 0), np.float32), *tables], axis=1)

    def view_of(self, numbers: np.ndarray) -> np.ndarray:
        """Returns which view some numbers, (..., numbers of all), choose: int64 in [0, views)."""
        view = np.zeros(numbers.shape[:-1], np.int64)
        for one, columns in self._with_columns():
            view = view * (one.views or 1) + one.view_of(numbers[..., columns])
        return view

    def numbers_of(self, view: int) -> np.ndarray:
        """Returns numbers, float32 (numbers of all,), that choose a view."""
        parts = []
        for one, _ in reversed(self._with_columns()):
            view, own = divmod(view, one.views or 1)
            parts.append(one.numbers_of(own))
        return np.concatenate([np.zeros(0, np.float32), *reversed(parts)])

    def change_pixels(self, photos: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Applies what works on uint8 photos (batch, height, width, 3), before `apply`."""
        for one, columns in self._with_columns():
            photos = one.change_pixels(photos, numbers[:, columns])
        return photos

    def apply(self, photos: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
        """Applies all the rest but mixing to float32 photos in [0, 255]."""
        for one, columns in self._with_columns():
            photos = one.apply(photos, numbers[:, columns])
        return photos

    def mixing_numbers(self, numbers: tf.Tensor) -> tf.Tensor:
        """Returns the columns of `mixing`, which are the last ones."""
        return numbers[:, -self.mixing.numbers :] if self.mixing else numbers[:, :0]
