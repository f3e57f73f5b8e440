"""`DataLoader`: batches of photos for training and evaluation."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from research.data.augmentation import AugmentationPipeline, HorizontalFlip
from research.data.batches import Batch, Preprocessing, make_batches
from research.data.open_source import open_source
from research.data.order import Share, continued_order
from research.data.photo_cache import PhotoCache, check_usable
from research.data.raw_photos import random_raw_images
from research.data.source import Source
from research.data.split_arrays import SplitArrays
from research.system.progress import photo_bar


def scale_to_unit(image: tf.Tensor) -> tf.Tensor:
    """Scales float32 pixels from [0, 255] to [-1, 1]."""
    return image / 127.5 - 1.0


@dataclasses.dataclass(eq=False, repr=False)
class DataLoader:
    """Decodes, resizes, shuffles, augments and batches photos.

    The photos of a split are decoded when the split is first used; see `PhotoCache`.

    Args:
      image_size: height and width in pixels that photos are resized to.
      batch_size: photos per batch.
      source: where the photos come from; by default TFDS `cats_vs_dogs`.
      preprocessing: converts float32 RGB in [0, 255], shape (batch, size, size, 3), to the model's
        input; by default to [-1, 1]. None leaves inputs unchanged.
      shuffle_size: size of the shuffle buffer in photos.
      steps_per_epoch: length of an epoch in steps. The next epoch continues with the photos that
        follow. 0 for epochs of all photos.
      seed: seed of the order of photos and of the augmentation.
      augmentation: random changes of the training photos, new in each epoch.
      mirror_averaging: whether evaluation batches also hold the mirror images.
      resize: how photos become squares: `squash`, `crop` or `pad`, see `decode_image`.
      photo_cache: where decoded photos are kept.
      finishes_on_device: whether batches have photos before preprocessing; steps call `finish`.

    Attributes:
      loaded: the splits that were decoded so far.

    Raises:
      UserError: when all photos of a split are damaged, or when there are no training photos.
    """

    image_size: int = 160
    batch_size: int = 32
    _: dataclasses.KW_ONLY
    source: Source = dataclasses.field(
        default_factory=lambda: open_source("cats_vs_dogs", None, None)
    )
    preprocessing: Preprocessing | None = scale_to_unit
    shuffle_size: int = 1000
    steps_per_epoch: int = 0
    seed: int = 0
    augmentation: AugmentationPipeline = dataclasses.field(default_factory=AugmentationPipeline)
    mirror_averaging: bool = False
    resize: str = "squash"
    photo_cache: PhotoCache = dataclasses.field(default_factory=PhotoCache)
    finishes_on_device: bool = False
    loaded: dict[str, SplitArrays] = dataclasses.field(default_factory=dict, init=False)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their labels."""
        return self.source.class_names

    @property
    def num_train_examples(self) -> int:
        """The number of usable photos in the training split."""
        return len(self.examples("train"))

    @property
    def train_batches(self) -> tf.data.Dataset:
        """The batches of the first training epoch; see `make_batches` for their format."""
        return self.epoch_batches(0)

    @property
    def validation_batches(self) -> tf.data.Dataset:
        """The validation split in stored order."""
        return self.split_batches("validation")

    @property
    def test_batches(self) -> tf.data.Dataset:
        """The test split in stored order."""
        return self.split_batches("test")

    def epoch_batches(
        self, epoch: int, start: int = 0, share: Share | None = None
    ) -> tf.data.Dataset:
        """Returns the batches of a training epoch, beginning at step `start`.

        Args:
          epoch: index of the epoch, from 0.
          start: number of steps to skip. A step takes `share.parts` batches.
          share: the devices that the batches are for. None for whole batches.
        """
        examples = self.examples("train")
        count = len(examples)
        batch_size = min(self.batch_size, count)  # needs no padding if there are few photos
        photos_per_step = batch_size * (share.parts if share else 1)
        length = self.steps_per_epoch * photos_per_step if self.steps_per_epoch else count
        order = continued_order(count, self.shuffle_size, self.seed, epoch, length)
        # Each visit of a photo in an epoch has its own random numbers.
        visits = (epoch * length + np.arange(length)) // count - epoch * length // count
        return make_batches(
            examples,
            (order + visits * count)[start * photos_per_step :],
            batch_size,
            None if self.finishes_on_device else self.preprocessing,
            share=share,
            augmentation=self.augmentation,
            numbers=self.augmentation.draw((int(visits[-1]) + 1) * count, self.seed, epoch),
        )

    def split_batches(self, split: str, share: Share | None = None) -> tf.data.Dataset:
        """Returns all photos of a split once, in stored order; no batch if it has none."""
        examples = self.examples(split)
        return make_batches(
            examples,
            np.arange(len(examples)),
            min(self.batch_size, max(1, len(examples))),
            None if self.finishes_on_device else self.preprocessing,
            share=share,
            mirrored=self.mirror_averaging,
        )

    def finish(self, batch: Batch) -> Batch:
        """Returns a batch with preprocessed photos; the steps call it on the device.

        With `finishes_on_device`, photos are in [0, 255] until here: uint8, which are copied to a
        GPU in a quarter of the time, or float32 after augmentations that need it.
        """
        if not self.finishes_on_device or self.preprocessing is None:
            return batch
        photos = {name: batch[name] for name in ("image", "mirrored") if name in batch}
        return batch | {k: self.preprocessing(tf.cast(v, tf.float32)) for k, v in photos.items()}

    def augmentation_of(self, split: str) -> AugmentationPipeline:
        """Returns the augmentation that defines the views of a split.

        For splits other than 'train' it is the mirror image of `mirror_averaging`, or empty.
        """
        if split == "train":
            return self.augmentation
        return AugmentationPipeline([HorizontalFlip()] if self.mirror_averaging else [])

    def with_augmentation(self, augmentation: AugmentationPipeline) -> DataLoader:
        """Returns a loader of the same photos in the same order with another augmentation."""
        other = copy.copy(self)
        other.augmentation = augmentation
        return other

    def with_examples(self, loaded: Mapping[str, SplitArrays]) -> DataLoader:
        """Returns a loader in the same order with other inputs, which are not preprocessed."""
        other = copy.copy(self)
        other.preprocessing = None
        other.loaded = dict(loaded)
        return other

    def examples(self, split: str) -> SplitArrays:
        """Returns the decoded photos of a split, kept from the first call on; may be empty."""
        if split not in self.loaded:
            with photo_bar(f"decoding {split}", self.source.count(split)) as bar:
                place = (self.source, split, self.image_size, self.resize)
                decoded = self.photo_cache.load(*place, bar.update)
            check_usable(split, decoded)
            self.loaded[split] = decoded
        return self.loaded[split]

    def get_label_name(self, label: int) -> str:
        """Returns the name of a class; raises IndexError if the label is out of range."""
        if not 0 <= int(label) < len(self.class_names):
            raise IndexError(f"label is {label}; expected 0 to {len(self.class_names) - 1}")
        return self.class_names[int(label)]

    def get_random_raw_images(self, n: int) -> list[tuple[np.ndarray, int]]:
        """Returns `n` random training photos in their original size; see `random_raw_images`."""
        return random_raw_images(self.source, n, self.shuffle_size, self.seed)
