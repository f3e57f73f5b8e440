"""From examples to batches, in an order that follows from the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from research.examples import Examples

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


def epoch_flips(count: int, seed: int, epoch: int) -> np.ndarray:
    """Returns which examples an epoch shows mirrored, bool (count,), one in two by chance."""
    # The third number keeps these draws apart from those of the order.
    return np.random.default_rng([seed, epoch, 1]).random(count) < 0.5


def make_batches(
    examples: Examples,
    order: np.ndarray,
    batch_size: int,
    preprocessing: Preprocessing | None,
    flips: np.ndarray | None = None,
) -> tf.data.Dataset:
    """Returns the examples in the given order, batched; the last batch may be short.

    Args:
      examples: what to draw from.
      order: int64, indices into the examples.
      batch_size: photos a batch.
      preprocessing: applied to the photos, as float32 in [0, 255]; None leaves inputs as they are.
      flips: bool (examples,), which photos to mirror left to right; none if None.

    Returns:
      A data set of batches: `image` (batch, height, width, 3) float32, or what the cached trunk
      made of it; `label` int32 (batch,); `weight` float32 (batch,), 1 for each example.
    """
    inputs = examples.inputs

    def gather(indices: np.ndarray) -> list[np.ndarray]:
        gathered = [array[indices] for array in inputs]
        if flips is not None:
            mirrored = flips[indices]
            for array in gathered:
                array[mirrored] = array[mirrored, :, ::-1]
        return [*gathered, examples.labels[indices]]

    def batch_of(indices: tf.Tensor) -> Batch:
        types = [tf.as_dtype(array.dtype) for array in inputs] + [tf.int32]
        *gathered, label = tf.numpy_function(gather, [indices], types, stateful=False)
        for tensor, array in zip(gathered, inputs, strict=True):
            tensor.set_shape((None, *array.shape[1:]))
        label.set_shape((None,))
        if preprocessing is not None:
            gathered = [preprocessing(tf.cast(tensor, tf.float32)) for tensor in gathered]
        image = gathered[0] if len(gathered) == 1 else tuple(gathered)
        return {"image": image, "label": label, "weight": tf.ones_like(label, tf.float32)}

    return (
        tf.data.Dataset.from_tensor_slices(order)
        .batch(batch_size)
        .map(batch_of, num_parallel_calls=2, deterministic=True)
        .prefetch(2)
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


def pad_batch(batch: Batch, size: int) -> Batch:
    """Fills a short batch up to `size` examples with repetitions that weigh nothing.

    Every step then has one shape, is shared evenly by the devices and leaves none without an
    example. Real photos, not zeros, keep BatchNorm's statistics sane.
    """
    count = tf.shape(batch["label"])[0]
    positions = tf.range(size)

    def fill() -> Batch:
        filled: Batch = tf.nest.map_structure(
            lambda tensor: tf.gather(tensor, positions % count), batch
        )
        return {**filled, "weight": filled["weight"] * tf.cast(positions < count, tf.float32)}

    padded = tf.cond(count < size, fill, lambda: batch)
    return tf.nest.map_structure(
        lambda tensor: tf.ensure_shape(tensor, (size, *tensor.shape[1:])), padded
    )
