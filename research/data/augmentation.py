"""Augmentation: random changes of training photos, with random numbers as arguments."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from research.data.rand_augment import rand_augment
from research.system.errors import UserError

MAX_ASPECT_RATIO = 4 / 3


class Augmentation:
    """One random change of training photos.

    To add an augmentation, subclass this class in a file and give `--augmentation=FILE.py:Class`.

    Keras's augmentation layers draw from their own state, and some draw once per batch. Here the
    random numbers are arguments. They depend only on the run's seed, the augmentation's name, the
    epoch and the photo. So a run resumes exactly, batches and devices make no difference, and
    adding an augmentation does not change the others.

    Attributes:
      name: seeds the random numbers and appears in messages; by default the name of the class.
      numbers: random numbers per photo and epoch.
      views: number of different results per photo; None if they cannot be counted. Outputs of
        frozen layers can only be cached for a small number of views.
      keeps_bytes: whether `apply` also takes uint8 photos, and then returns uint8 photos. A
        subclass with another `apply` has to set it again.
    """

    name: str = "Augmentation"
    numbers: ClassVar[int] = 0
    views: ClassVar[int | None] = None
    keeps_bytes: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in vars(cls):
            cls.name = cls.__name__
        if "apply" in vars(cls) and "keeps_bytes" not in vars(cls):
            cls.keeps_bytes = False

    def draw(self, generator: np.random.Generator, photos: int) -> np.ndarray:
        """Returns the random numbers of an epoch, float32 (photos, numbers), in [0, 1)."""
        return generator.random((photos, self.numbers), dtype=np.float32)

    def change_pixels(self, photos: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Changes a batch with NumPy, before `apply` of all augmentations.

        Args:
          photos: uint8 (batch, height, width, 3). They must not be modified in place.
          numbers: float32 (batch, numbers).
        """
        return photos

    def apply(self, photos: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
        """Changes a batch with TensorFlow, in the graph of the input pipeline.

        Args:
          photos: float32 (batch, height, width, 3) in [0, 255]. With `keeps_bytes`, they can also
            be uint8.
          numbers: float32 (batch, numbers).

        Returns:
          Photos of the same shape, dtype and range.
        """
        return photos

    def view_of(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the view that numbers of shape (..., numbers) select, int64 in [0, views)."""
        return np.zeros(numbers.shape[:-1], np.int64)

    def numbers_of(self, view: int) -> np.ndarray:
        """Returns numbers that select a view, float32 (numbers,)."""
        return np.zeros(self.numbers, np.float32)


class RandAugment(Augmentation):
    """Applies two random operations to the pixels (Cubuk et al. 2019, arXiv 1909.13719).

    Args:
      magnitude: strength of the operations, in [0, 10].
    """

    name = "rand_augment"
    numbers = 4

    def __init__(self, magnitude: float) -> None:
        self.magnitude = magnitude

    def change_pixels(self, photos: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        pairs = zip(photos, numbers, strict=True)
        return np.stack([rand_augment(photo, self.magnitude, drawn) for photo, drawn in pairs])


class RandomCrop(Augmentation):
    """Crops photos and resizes the crops to the photo's size.

    Crops have an aspect ratio of 3:4 to 4:3 (Szegedy et al. 2014, arXiv 1409.4842).

    Args:
      min_area: smallest area of a crop, as a fraction of the photo's area, in (0, 1].
    """

    name = "random_crop_area"
    numbers = 4

    def __init__(self, min_area: float) -> None:
        self.min_area = min_area

    def apply(self, photos: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
        boxes = self.boxes(numbers)
        size = tf.shape(photos)[1:3]
        cropped = tf.image.crop_and_resize(photos, boxes, tf.range(tf.shape(boxes)[0]), size)
        return tf.ensure_shape(cropped, photos.shape)

    def boxes(self, numbers: tf.Tensor) -> tf.Tensor:
        """Returns the crops as top, left, bottom, right, (batch, 4), as fractions in [0, 1]."""
        area = 1 - numbers[:, 0] * (1 - self.min_area)
        # A large crop must be nearly square, because no side can be longer than the photo's.
        ratio = tf.minimum(MAX_ASPECT_RATIO, 1 / area) ** (2 * numbers[:, 1] - 1)
        height, width = tf.sqrt(area / ratio), tf.sqrt(area * ratio)
        top, left = numbers[:, 2] * (1 - height), numbers[:, 3] * (1 - width)
        return tf.stack([top, left, top + height, left + width], axis=1)


class HorizontalFlip(Augmentation):
    """Flips photos from left to right with a probability of 0.5."""

    name = "horizontal_flip"
    numbers = 1
    views = 2
    keeps_bytes = True

    def apply(self, photos: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
        flipped = numbers[:, 0, tf.newaxis, tf.newaxis, tf.newaxis] < 0.5
        return tf.where(flipped, tf.reverse(photos, [2]), photos)

    def view_of(self, numbers: np.ndarray) -> np.ndarray:
        return (numbers[..., 0] < 0.5).astype(np.int64)

    def numbers_of(self, view: int) -> np.ndarray:
        return np.array([0.25 if view else 0.75], np.float32)


class ColourJitter(Augmentation):
    """Multiplies brightness, contrast and saturation by random factors.

    Args:
      strength: the factors are in [1 - strength, 1 + strength]; in [0, 1].
    """

    name = "colour_jitter"
    numbers = 3

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def apply(self, photos: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
        factors = 1 + self.strength * (2 * numbers[:, :, tf.newaxis, tf.newaxis, tf.newaxis] - 1)
        brightness, contrast, saturation = tf.unstack(factors, axis=1)
        photos = tf.clip_by_value(photos * brightness, 0, 255)
        mean = tf.reduce_mean(tf.image.rgb_to_grayscale(photos), axis=(1, 2), keepdims=True)
        photos = tf.clip_by_value(mean + (photos - mean) * contrast, 0, 255)
        grey = tf.image.rgb_to_grayscale(photos)
        return tf.clip_by_value(grey + (photos - grey) * saturation, 0, 255)


class Mixing(Augmentation):
    """Mixes each photo and its label with another photo of the training split.

    If both parameters are given, one of the two methods is chosen at random for each photo.

    Args:
      mixup: parameter of the Beta distribution of the weight for blending two photos (Zhang et al.
        2018, arXiv 1710.09412); 0 to switch it off.
      cutmix: parameter of the Beta distribution of the area of a box that is replaced (Yun et al.
        2019, arXiv 1905.04899); 0 to switch it off.
    """

    # Columns of the numbers: index of the partner, choice of method, corner of the box, share of
    # the partner.
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
        # The photo itself has the larger share, because accuracy is computed with its label.
        drawn[:, self.SHARE] = np.minimum(share, 1 - share)
        return drawn

    def cuts(self, numbers: Any) -> Any:
        """Returns for numbers of shape (..., numbers) whether a box is replaced (CutMix)."""
        probability = 0.5 if self.mixup and self.cutmix else float(self.cutmix > 0)
        return numbers[..., self.IS_CUT] < probability

    def mix(
        self, photos: tf.Tensor, partners: tf.Tensor, numbers: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Mixes each photo with its partner, after `apply` of all augmentations.

        Args:
          photos: float32 (batch, height, width, 3).
          partners: the other photos, of the same shape.
          numbers: float32 (batch, numbers), of `photos`.

        Returns:
          The mixed photos, and the share of the partner in each, float32 (batch,).
        """
        share = numbers[:, self.SHARE]
        boxes = _box_masks(share, numbers[:, self.CORNER], photos.shape[1], photos.shape[2])
        blend = tf.broadcast_to(share[:, tf.newaxis, tf.newaxis, tf.newaxis], tf.shape(boxes))
        weight = tf.where(self.cuts(numbers)[:, tf.newaxis, tf.newaxis, tf.newaxis], boxes, blend)
        # The sides of a box are rounded to whole pixels, so its share is computed from the mask.
        return photos + weight * (partners - photos), tf.reduce_mean(weight, axis=(1, 2, 3))


def _box_masks(share: tf.Tensor, corner: tf.Tensor, height: int, width: int) -> tf.Tensor:
    """Returns 1 inside a box with this share of the area, else 0: (batch, height, width, 1)."""
    sides = []
    for size, drawn in ((height, corner[:, 0]), (width, corner[:, 1])):
        length = tf.round(tf.sqrt(share) * size)
        begin = tf.floor(drawn * (size - length + 1))
        place = tf.range(size, dtype=tf.float32)[tf.newaxis]
        inside = (place >= begin[:, tf.newaxis]) & (place < (begin + length)[:, tf.newaxis])
        sides.append(tf.cast(inside, tf.float32))
    rows, columns = sides
    return rows[:, :, tf.newaxis, tf.newaxis] * columns[:, tf.newaxis, :, tf.newaxis]


class AugmentationPipeline:
    """Augmentations that are applied one after another. Mixing comes last.

    Args:
      augmentations: with different names, and with at most one `Mixing`.

    Raises:
      UserError: two augmentations have the same name, and so would get the same random numbers;
        there are two `Mixing`; an attribute `numbers` is no count; or the numbers of a view do not
        select this view.
    """

    def __init__(self, augmentations: Sequence[Augmentation] = ()) -> None:
        names = [augmentation.name for augmentation in augmentations]
        if len(set(names)) < len(names):
            raise UserError(
                f"augmentations are named {', '.join(names)}; expected different names, because "
                "each name seeds the random numbers"
            )
        if sum(isinstance(one, Mixing) for one in augmentations) > 1:
            raise UserError(
                f"augmentations are {', '.join(names)}; expected at most one that mixes photos"
            )
        for one in augmentations:
            if not isinstance(one.numbers, (int, np.integer)) or one.numbers < 0:
                raise UserError(
                    f"augmentation {one.name} has numbers = {one.numbers!r}; expected an integer "
                    "of at least 0"
                )
            views = range(one.views or 1)
            if [int(one.view_of(one.numbers_of(view))) for view in views] != list(views):
                raise UserError(
                    f"augmentation {one.name} has {one.views} views, but view_of(numbers_of(view)) "
                    "is not view for each of them; define both methods"
                )
        self.steps = [one for one in augmentations if not isinstance(one, Mixing)]
        self.mixing = next((one for one in augmentations if isinstance(one, Mixing)), None)
        # Each augmentation with its columns in the array of all numbers.
        self._columns: list[tuple[Augmentation, slice]] = []
        begin = 0
        for one in (*self.steps, *([self.mixing] if self.mixing else [])):
            self._columns.append((one, slice(begin, begin + one.numbers)))
            begin += one.numbers

    def __bool__(self) -> bool:
        return bool(self.steps or self.mixing)

    @property
    def keeps_bytes(self) -> bool:
        """Whether uint8 photos stay uint8 photos."""
        return not self.mixing and all(one.keeps_bytes for one in self.steps)

    @property
    def endless(self) -> str | None:
        """The name of the first augmentation whose views cannot be counted, or None."""
        return next((one.name for one, _ in self._columns if one.views is None), None)

    @property
    def views(self) -> int | None:
        """The number of different results per photo; None if they cannot be counted."""
        return None if self.endless else math.prod(one.views or 1 for one in self.steps)

    @property
    def countable(self) -> AugmentationPipeline:
        """A pipeline of only the augmentations whose views can be counted."""
        return AugmentationPipeline([one for one in self.steps if one.views is not None])

    def draw(self, photos: int, seed: int, epoch: int) -> np.ndarray:
        """Returns the random numbers of an epoch, float32 (photos, numbers of all augmentations).

        Each augmentation has its own generator. The numbers of a photo depend on its index, and not
        on the order, the batches or the devices.
        """
        tables = []
        for one, _ in self._columns:
            digest = hashlib.sha256(one.name.encode()).digest()
            # The third number separates this stream from the one that shuffles the photos.
            stream = np.random.default_rng([seed, epoch, 1, int.from_bytes(digest[:8], "big")])
            drawn = one.draw(stream, photos)
            expected = (photos, one.numbers)
            is_array = isinstance(drawn, np.ndarray) and drawn.dtype.kind in "fiub"
            if not is_array or drawn.shape != expected:
                shape = f"the shape {drawn.shape}" if is_array else f"{drawn!r:.200}"
                raise UserError(
                    f"draw of augmentation {one.name} returns {shape}; expected numbers of the "
                    f"shape {expected}: a row per photo, with as many columns as its attribute "
                    "numbers says"
                )
            tables.append(drawn.astype(np.float32))
        return np.concatenate([np.zeros((photos, 0), np.float32), *tables], axis=1)

    def view_of(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the view that numbers of shape (..., numbers) select, int64 in [0, views)."""
        view = np.zeros(numbers.shape[:-1], np.int64)
        for one, columns in self._columns:
            view = view * (one.views or 1) + one.view_of(numbers[..., columns])
        return view

    def numbers_of(self, view: int) -> np.ndarray:
        """Returns numbers that select a view, float32 (numbers,)."""
        parts = []
        for one, _ in reversed(self._columns):
            view, own = divmod(view, one.views or 1)
            parts.append(one.numbers_of(own))
        return np.concatenate([np.zeros(0, np.float32), *reversed(parts)])

    def change_pixels(self, photos: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Applies `change_pixels` of all augmentations to uint8 photos."""
        for one, columns in self._columns:
            changed = one.change_pixels(photos, numbers[:, columns])
            changed = np.asarray(changed) if isinstance(changed, tf.Tensor) else changed
            _check_same(one.name, changed, photos)
            photos = changed
        return photos

    def apply(self, photos: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
        """Applies `apply` of all augmentations, without mixing, to float32 photos in [0, 255]."""
        for one, columns in self._columns:
            changed = one.apply(photos, numbers[:, columns])
            _check_same(one.name, changed, photos)
            photos = changed
        return photos


def _check_same(name: str, found: Any, expected: np.ndarray | tf.Tensor) -> None:
    """Raises `UserError` if an augmentation changes the type, dtype or shape of photos."""
    what = f"augmentation {name} returns"
    is_tensor = isinstance(expected, tf.Tensor)
    if not isinstance(found, tf.Tensor if is_tensor else np.ndarray):
        kind = "tensor" if is_tensor else "NumPy array"
        raise UserError(f"{what} {found!r:.200}; expected a {kind} of shape {expected.shape}")
    shape = tf.TensorShape(expected.shape)
    if found.dtype != expected.dtype or not shape.is_compatible_with(found.shape):
        raise UserError(
            f"{what} {found.dtype.name} {found.shape} for {expected.dtype.name} {expected.shape}; "
            "expected the same dtype and shape"
        )
