"""From examples to batches, in an order that follows from the seed and the epoch alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from research.data.augmentation import AugmentationPipeline
from research.data.split_arrays import SplitArrays

Batch = dict[str, tf.Tensor]
Preprocessing = Callable[[tf.Tensor], tf.Tensor]


def epoch_order(count: int, shuffle_size: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order in which an epoch visits `count` examples, int64 (count,).

    The next example is drawn from a window of `shuffle_size` that slides over the stored order,
    as `tf.data.Dataset.shuffle` does it; but the order is known beforehand, so that a run can
    resume at any batch of it. A window of 1 keeps the stored order.
    """
    generator = np.random.default_rng([seed, epoch])
    if shuffle_size >= count:
        return generator.permutation(count)
    window = np.arange(shuffle_size)
    order = np.empty(count, np.int64)
    draws = generator.integers(shuffle_size, size=count - shuffle_size)
    for position, drawn in enumerate(draws):
        order[position] = window[drawn]
        window[drawn] = position + shuffle_size
    order[count - shuffle_size :] = generator.permutation(window)
    return order


def continued_order(
    count: int, shuffle_size: int, seed: int, epoch: int, length: int
) -> np.ndarray:
    """Returns the order of an epoch of `length` examples, int64 (length,), at most `count`.

    It goes on where the epoch before it ended, so that short epochs together visit all examples
    equally often, as `tf.data.Dataset.repeat` does it.
    """
    first = epoch * length
    passes = range(first // count, (first + length - 1) // count + 1)
    orders = [epoch_order(count, shuffle_size, seed, number) for number in passes]
    return np.concatenate(orders)[first - passes[0] * count :][:length]


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of every step's photos that some of the devices take.

    Attributes:
      replicas: how many devices share the photos of a step.
      first: the first of the devices that are meant.
      count: how many are meant.
      parts: batches a step, which each device works through one after another.
    """

    replicas: int = 1
    first: int = 0
    count: int = 1
    parts: int = 1

    def rows(self, order: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Shares out batches of `batch_size` examples, each device the same number.

        What is missing for that is filled up with repetitions that weigh nothing. Every step then
        has one shape, and which example is in which batch does not depend on the devices.

        Args:
          order: int64 (examples,), in the order in which they are to be visited.
          batch_size: examples a batch, over all devices.

        Returns:
          The indices of examples, int64, and their weights, float32, 1 or 0; both of shape
          (steps * count, parts * ceil(batch_size / replicas)).
        """
        batches = -(-len(order) // (batch_size * self.parts)) * self.parts
        width = -(-batch_size // self.replicas)
        first = np.arange(batches)[:, np.newaxis] * batch_size
        counts = np.clip(len(order) - first, 0, batch_size)
        columns = np.arange(self.replicas * width)
        positions = np.where(counts > 0, first + columns % np.maximum(counts, 1), 0)
        weights = (columns < counts).astype(np.float32)

        def of_share(table: np.ndarray) -> np.ndarray:
            parted = table.reshape(-1, self.parts, self.replicas, width).swapaxes(1, 2)
            meant = parted[:, self.first : self.first + self.count]
            return meant.reshape(-1, self.parts * width)

        return order[of_share(positions)], of_share(weights)


def share_out(
    batches: Callable[[Share], tf.data.Dataset], strategy: tf.distribute.Strategy, parts: int = 1
) -> tf.data.Dataset | tf.distribute.DistributedDataset:
    """Gives each device its share of every batch; each worker reads only the shares of its own.

    Args:
      batches: from a share to its batches, one element a device and step.
      strategy: whose devices.
      parts: batches a step, see `Share`.
    """
    # All elements have one shape, and all workers equally many: no worker has to ask the others
    # in every step whether they have one more.
    strategy.extended.experimental_enable_get_next_as_optional = False

    def of_input(context: tf.distribute.InputContext) -> tf.data.Dataset:
        count = context.num_replicas_in_sync // context.num_input_pipelines
        first = context.input_pipeline_id * count
        return batches(Share(context.num_replicas_in_sync, first, count, parts))

    return strategy.distribute_datasets_from_function(of_input)


def make_batches(
    examples: SplitArrays,
    order: np.ndarray,
    batch_size: int,
    preprocessing: Preprocessing | None,
    *,
    share: Share | None = None,
    augmentation: AugmentationPipeline | None = None,
    numbers: np.ndarray | None = None,
    mirrored: bool = False,
) -> tf.data.Dataset:
    """Returns the examples in the given order, batched.

    Args:
      examples: what to draw from.
      order: int64, indices into the examples.
      batch_size: photos per batch.
      preprocessing: applied to the photos, as float32 in [0, 255]; None leaves inputs as they are.
      share: the part that some devices take, one element per device and step, all of one shape;
        None for whole batches. The last one may be short.
      augmentation: how photos are changed before that, or chosen among the views that inputs hold.
      numbers: the random numbers of the augmentation, see `AugmentationPipeline.draw`.
      mirrored: give mirror images too; of inputs that hold views, the second one.

    Returns:
      A data set of batches: `image` (batch, height, width, 3) float32, or what the cached trunk
      made of it; `label` (batch, ...), int32 for classes; `weight` float32 (batch,), 1 for each
      example, 0 for a repetition that pads a share; the source's arrays by name, (batch, ...);
      `mirrored` like `image`, if asked for; and where photos are mixed, `partner_label` like
      `label` and `partner_share` float32 (batch,).
    """
    augmentation = augmentation or AugmentationPipeline()
    inputs = [np.asarray(array) for array in examples.inputs]  # a memmap as what it is, an array
    rows: int | None = None
    if share is None:
        chosen = tf.data.Dataset.from_tensor_slices((order, np.ones(len(order), np.float32)))
        chosen = chosen.batch(batch_size)
    else:
        indices, weights = share.rows(order, batch_size)
        rows = indices.shape[1]
        chosen = tf.data.Dataset.from_tensor_slices((indices, weights))

    if numbers is None:
        numbers = np.zeros((len(examples), 0), np.float32)
    shown_by = np.arange(len(examples))  # the row of the inputs that shows each example
    if examples.views > 1 and not mirrored:
        shown_by += augmentation.view_of(numbers) * len(examples)
        augmentation = AugmentationPipeline()  # it is in the inputs already
    # Tensors, which go with the data set: TensorFlow keeps `take`, and what it refers to, for as
    # long as the process lives.
    all_numbers, all_rows = tf.constant(numbers), tf.constant(shown_by)
    targets = {
        name: tf.constant(array)
        for name, array in {**examples.arrays, "label": examples.labels}.items()
    }

    def take(taken: np.ndarray, drawn: np.ndarray) -> list[np.ndarray]:
        # `np.take` lets go of Python's lock, so that the next step can be started meanwhile.
        gathered = [np.take(array, taken, axis=0) for array in inputs]
        return [augmentation.change_pixels(gathered[0], drawn), *gathered[1:]]

    def read(indices: tf.Tensor, skipped: int = 0) -> list[tf.Tensor]:
        """Returns what shows some examples, from so many rows of the inputs on."""
        drawn = tf.gather(all_numbers, indices)
        types = [tf.as_dtype(array.dtype) for array in inputs]
        taken = tf.gather(all_rows, indices) + skipped
        images = tf.numpy_function(take, [taken, drawn], types, stateful=False)
        for tensor, array in zip(images, inputs, strict=True):
            tensor.set_shape((rows, *array.shape[1:]))
        if preprocessing is not None or augmentation:
            images = [augmentation.apply(tf.cast(image, tf.float32), drawn) for image in images]
        return images

    def preprocess(images: list[tf.Tensor]) -> tf.Tensor | tuple[tf.Tensor, ...]:
        if preprocessing is not None:
            images = [preprocessing(image) for image in images]
        return images[0] if len(images) == 1 else tuple(images)

    # Nothing in it is Python's control flow on tensors, and looking for that takes time.
    @tf.autograph.experimental.do_not_convert
    def batch_of(indices: tf.Tensor, weights: tf.Tensor) -> Batch:
        images = read(indices)
        batch = {name: tf.gather(array, indices) for name, array in targets.items()}
        batch["weight"] = weights
        if mirrored and examples.views > 1:
            batch["mirrored"] = preprocess(read(indices, skipped=len(examples)))
        elif mirrored:
            batch["mirrored"] = preprocess([tf.reverse(image, [2]) for image in images])
        mixing = augmentation.mixing
        if mixing:
            drawn = augmentation.mixing_numbers(tf.gather(all_numbers, indices))
            partners = mixing.partners(drawn)
            batch["partner_label"] = tf.gather(targets["label"], partners)
            mixed, batch["partner_share"] = mixing.mix(images[0], read(partners)[0], drawn)
            images = [mixed]
        return {"image": preprocess(images), **batch}

    return (
        chosen.map(batch_of, num_parallel_calls=2, deterministic=True)
        .prefetch(2 * (share.count if share else 1))
        .with_options(pipeline_options())
    )


def pipeline_options() -> tf.data.Options:
    """Returns options that switch tf.data's autotuning off.

    Nothing here is left to tune, and an iterator that is tuned waits for its tuning thread when it
    ends: up to five seconds an epoch.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return options
