"""From the arrays of a split to batches: gather, augment, mix, preprocess."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from research.data.augmentation import AugmentationPipeline
from research.data.order import Share
from research.data.split_arrays import SplitArrays
from research.system import devices
from research.system.machine import processors

Batch = dict[str, tf.Tensor]
Preprocessing = Callable[[tf.Tensor], tf.Tensor]


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
    """Returns batches of the examples in the given order.

    Args:
      examples: the examples to choose from.
      order: int64, rows of `numbers`. Row r belongs to example r % len(examples).
      batch_size: photos per batch.
      preprocessing: applied to photos, float32 in [0, 255]. None leaves them uint8 if it can.
      share: the devices that the batches are for, one element per device and step, all of the same
        shape. None for whole batches; then the last batch can be shorter.
      augmentation: applied before the preprocessing. If the inputs hold several views, it selects
        a view instead.
      numbers: random numbers of the augmentation for each visit of each example, float32 (visits *
        examples, numbers), see `AugmentationPipeline.draw`.
      mirrored: whether to add the mirror images. If the inputs hold several views, the second view
        is the mirror image.

    Returns:
      A data set of batches with these keys:
        image: float32 (batch, height, width, 3), or the cached activations or features.
        label: (batch, ...), int32 for classes.
        weight: float32 (batch,), 1 for examples and 0 for padding.
        mirrored: like `image`, if requested.
        partner_label, partner_share: like `label`, and float32 (batch,), if photos are mixed.
        The arrays of the source, (batch, ...), by their names.
    """
    augmentation = augmentation or AugmentationPipeline()
    inputs = examples.inputs
    rows: int | None = None
    if share is None:
        chosen = tf.data.Dataset.from_tensor_slices((order, np.ones(len(order), np.float32)))
        chosen = chosen.batch(batch_size)
    else:
        indices, weights = share.rows(order, batch_size)
        rows = indices.shape[1]
        chosen = tf.data.Dataset.from_tensor_slices((indices, weights))

    numbers = np.zeros((len(examples), 0), np.float32) if numbers is None else numbers
    input_rows = np.arange(len(numbers)) % len(examples)  # the row of the inputs for each visit
    if examples.views > 1 and not mirrored:
        input_rows += augmentation.view_of(numbers) * len(examples)
        augmentation = AugmentationPipeline()  # the inputs are augmented already
    # As tensors they are freed with the data set. TensorFlow keeps `take` and all that it refers to
    # until the process ends.
    all_numbers, all_rows = tf.constant(numbers), tf.constant(input_rows)
    targets = {
        name: tf.constant(array)
        for name, array in {**examples.arrays, "label": examples.labels}.items()
    }

    def take(taken: np.ndarray, drawn: np.ndarray) -> list[np.ndarray]:
        # `take` releases Python's lock, so that the next step can be started meanwhile.
        gathered = [np.asarray(array.take(taken, axis=0)) for array in inputs]
        return [augmentation.change_pixels(gathered[0], drawn), *gathered[1:]]

    def read(indices: tf.Tensor, first_row: int = 0) -> list[tf.Tensor]:
        """Returns the augmented inputs of some examples, counted from a row of the inputs."""
        drawn = tf.gather(all_numbers, indices)
        types = [tf.as_dtype(array.dtype) for array in inputs]
        taken = tf.gather(all_rows, indices) + first_row
        images = tf.numpy_function(take, [taken, drawn], types, stateful=False)
        for tensor, array in zip(images, inputs, strict=True):
            tensor.set_shape((rows, *array.shape[1:]))
        if not augmentation.keeps_bytes:
            images = [tf.cast(image, tf.float32) for image in images]
        return [augmentation.apply(image, drawn) for image in images]

    def usable(indices: tf.Tensor, images: list[tf.Tensor]) -> tf.Tensor | float:
        """Returns 0 for photos that reading `images` found to be damaged, and 1 for all others."""
        if examples.weights is None:
            return 1.0
        with tf.control_dependencies(images):
            found = tf.numpy_function(examples.weights.take, [indices % len(examples)], tf.float32)
        return tf.ensure_shape(found, indices.shape)

    def preprocess(images: list[tf.Tensor]) -> tf.Tensor | tuple[tf.Tensor, ...]:
        if preprocessing is not None:
            images = [preprocessing(tf.cast(image, tf.float32)) for image in images]
        return images[0] if len(images) == 1 else tuple(images)

    # AutoGraph is not needed without Python control flow on tensors, and would take time.
    @tf.autograph.experimental.do_not_convert
    def batch_of(indices: tf.Tensor, weights: tf.Tensor) -> Batch:
        images = read(indices)
        batch = {name: tf.gather(array, indices % len(examples)) for name, array in targets.items()}
        batch["weight"] = weights * usable(indices, images)
        if mirrored and examples.views > 1:
            batch["mirrored"] = preprocess(read(indices, first_row=len(examples)))
        elif mirrored:
            batch["mirrored"] = preprocess([tf.reverse(image, [2]) for image in images])
        mixing = augmentation.mixing
        if mixing:
            drawn = tf.gather(all_numbers, indices)[:, -mixing.numbers :]
            partners = tf.cast(drawn[:, mixing.PARTNER], tf.int64)
            batch["partner_label"] = tf.gather(targets["label"], partners % len(examples))
            partner_images = read(partners)
            batch["weight"] *= usable(partners, partner_images)
            images[0], batch["partner_share"] = mixing.mix(images[0], partner_images[0], drawn)
        return {"image": preprocess(images), **batch}

    # On a CPU, more would take processors from the step. On a GPU, 8 kept up with MobileNetV2.
    parallel = min(max(processors() // 2, 2), 8) if devices.has_gpu() else 2
    return (
        chosen.map(batch_of, num_parallel_calls=parallel, deterministic=True)
        .prefetch(2 * (share.count if share else 1))
        .with_options(devices.pipeline_options())
    )
