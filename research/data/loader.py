"""`DataLoader`: photos from a folder or a TFDS data set as batches for training and evaluation."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from research.data.augmentation import AugmentationPipeline, HorizontalFlip
from research.data.batches import Preprocessing, Share, continued_order, make_batches
from research.data.decode import DamagedImageError, decode_image, oddities_ignored
from research.data.open_source import open_source
from research.data.source import Source
from research.data.split_arrays import SplitArrays, load_split
from research.system.errors import UserError
from research.system.progress import photo_bar


def scale_to_unit(image: tf.Tensor) -> tf.Tensor:
    """Scales float32 pixels from [0, 255] to [-1, 1]."""
    return image / 127.5 - 1.0


class DataLoader:
    """Splits, decodes, resizes, shuffles and batches photos.

    Photos are decoded once, when a split is first asked for, and then kept as uint8.

    Args:
      image_size: height and width in pixels that photos are resized to.
      batch_size: photos a batch.
      source: where the photos come from; TFDS `cats_vs_dogs` if None.
      preprocessing: from float32 RGB in [0, 255], shape (batch, size, size, 3), to what the model
        takes; to [-1, 1] by default. None leaves inputs as they are.
      shuffle_size: photos that the next one of an epoch is drawn from.
      steps_per_epoch: ends each epoch after so many steps, and the next one goes on with the photos
        after them; None for epochs of all photos.
      seed: of the order of photos and of how they are changed.
      augmentation: how training photos are changed by chance, anew each epoch.
      mirror_averaging: give the mirror images of photos that are evaluated too.

    Raises:
      UserError: when a split has no photo that can be used.
    """

    def __init__(
        self,
        image_size: int = 160,
        batch_size: int = 32,
        *,
        source: Source | None = None,
        preprocessing: Preprocessing | None = scale_to_unit,
        shuffle_size: int = 1000,
        steps_per_epoch: int | None = None,
        seed: int = 0,
        augmentation: AugmentationPipeline | None = None,
        mirror_averaging: bool = False,
    ) -> None:
        self.image_size = image_size
        self.batch_size = batch_size
        self.source: Source = source or open_source("cats_vs_dogs", None, None)
        self.preprocessing = preprocessing
        self.shuffle_size = shuffle_size
        self.steps_per_epoch = steps_per_epoch
        self.seed = seed
        self.augmentation = augmentation or AugmentationPipeline()
        self.mirror_averaging = mirror_averaging
        self._loaded: dict[str, SplitArrays] = {}

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
        """The training split in the order of the first epoch; see `make_batches` for its form."""
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
        """Returns the batches of a training epoch, from the step with index `start` on.

        Args:
          epoch: which one, from 0.
          start: steps to leave out; a step takes `share.parts` batches.
          share: the part that some devices take; whole batches if None.
        """
        examples = self.examples("train")
        photos_a_step = self.batch_size * (share.parts if share else 1)
        count = len(examples)
        length = min((self.steps_per_epoch or count) * photos_a_step, count)
        order = continued_order(count, self.shuffle_size, self.seed, epoch, length)
        rest = order[start * photos_a_step :]
        return make_batches(
            examples,
            rest,
            self._largest_batch(examples),
            self.preprocessing,
            share=share,
            augmentation=self.augmentation,
            numbers=self.augmentation.draw(count, self.seed, epoch),
        )

    def split_batches(self, split: str, share: Share | None = None) -> tf.data.Dataset:
        """Returns all photos of a split once, in stored order."""
        examples = self.examples(split)
        order = np.arange(len(examples))
        size = self._largest_batch(examples)
        return make_batches(
            examples,
            order,
            size,
            self.preprocessing,
            share=share,
            mirrored=self.mirror_averaging,
        )

    def with_augmentation(self, augmentation: AugmentationPipeline) -> DataLoader:
        """Returns a loader of the same photos in the same order with another augmentation."""
        other = copy.copy(self)
        other.augmentation = augmentation
        return other

    def with_few_views(self) -> DataLoader:
        """Returns a loader of the same photos without the augmentations that have endless views."""
        return self.with_augmentation(self.augmentation.countable)

    def augmentation_of(self, split: str) -> AugmentationPipeline:
        """Returns whose views are shown: the augmentation, or outside of training the mirror."""
        if split == "train":
            return self.augmentation
        return AugmentationPipeline([HorizontalFlip()] if self.mirror_averaging else [])

    def view_batches(self, split: str, view: int, batch_size: int) -> tf.data.Dataset:
        """Returns all photos of a split once, in stored order, all in the same view."""
        examples, augmentation = self.examples(split), self.augmentation_of(split)
        return make_batches(
            examples,
            np.arange(len(examples)),
            batch_size,
            self.preprocessing,
            augmentation=augmentation,
            numbers=np.tile(augmentation.numbers_of(view), (len(examples), 1)),
        )

    def _largest_batch(self, examples: SplitArrays) -> int:
        """Returns the batch size, or less where there are fewer photos: none is filled up then."""
        return min(self.batch_size, len(examples))

    def examples(self, split: str) -> SplitArrays:
        """Returns the decoded photos of a split, which are kept from the first call on."""
        if split not in self._loaded:
            with photo_bar(f"decoding {split}") as bar:

                def show(done: int, total: int) -> None:
                    bar.total = total
                    bar.update(done - bar.n)

                loaded = load_split(self.source, split, self.image_size, show)
            if not len(loaded):
                raise UserError(
                    f"the {split} split has no usable photo ({len(loaded.damaged)} damaged); "
                    "expected at least one: give more photos"
                )
            self._loaded[split] = loaded
        return self._loaded[split]

    def with_examples(self, loaded: Mapping[str, SplitArrays]) -> DataLoader:
        """Returns a loader of the same photos in the same order, but with these inputs, as is."""
        other = copy.copy(self)
        other.preprocessing = None
        other._loaded = dict(loaded)
        return other

    def damage_report(self) -> str | None:
        """Returns one summary of the damaged photos in the splits loaded so far, None if none."""
        damaged = [entry for loaded in self._loaded.values() for entry in loaded.damaged]
        if not damaged:
            return None
        shown = [f"  {name}: {reason}" for name, reason in damaged[:10]]
        if len(damaged) > len(shown):
            shown.append(f"  ... and {len(damaged) - len(shown)} more")
        photos = "photo" if len(damaged) == 1 else "photos"
        return "\n".join([f"skipped {len(damaged)} damaged {photos}:", *shown])

    def get_label_name(self, label: int) -> str:
        """Returns the name of a class; raises IndexError for a label that is out of range."""
        if not 0 <= int(label) < len(self.class_names):
            raise IndexError(f"label is {label}; expected 0 to {len(self.class_names) - 1}")
        return self.class_names[int(label)]

    def get_random_raw_images(self, n: int) -> list[tuple[np.ndarray, int]]:
        """Returns `n` training photos in their own size, each as (uint8 RGB, label).

        They are drawn by the seed from the first `shuffle_size` photos; fewer than `n` come back
        where there are fewer.
        """
        count = min(self.shuffle_size, self.source.count("train"))
        order = np.random.default_rng([self.seed, n]).permutation(count).tolist()
        # A thousand photos as cameras store them take gigabytes: few more are read than are shown.
        tried = 2 * n
        while True:
            drawn = self._decode_some(order[:tried], n)
            if len(drawn) == n or tried >= count:
                return drawn
            tried *= 4

    def _decode_some(self, places: Sequence[int], n: int) -> list[tuple[np.ndarray, int]]:
        """Decodes the first `n` usable ones of the training photos at some places."""
        wanted, last = set(places), max(places, default=-1)
        stored = zip(range(last + 1), self.source.examples("train"), strict=False)
        found = {place: example for place, example in stored if place in wanted}
        drawn: list[tuple[np.ndarray, int]] = []
        for place in places:
            if len(drawn) == n:
                break
            with contextlib.suppress(DamagedImageError), oddities_ignored():
                drawn.append((decode_image(found[place].image), found[place].label))
        return drawn
