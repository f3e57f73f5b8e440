"""The order of the photos in an epoch, and their distribution over the devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from research.system import devices

BATCHES_AHEAD = 2  # on a GPU, copied while it computes


def epoch_order(count: int, shuffle_size: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of `count` examples in an epoch, int64 (count,).

    Each example is drawn from a buffer of `shuffle_size` examples that is refilled in stored order,
    as in `tf.data.Dataset.shuffle`. The order is computed in advance, so that a run can resume at
    any batch. A buffer of 1 keeps the stored order.
    """
    generator = np.random.default_rng([seed, epoch])
    if shuffle_size >= count:
        return generator.permutation(count)
    buffer = np.arange(shuffle_size)
    order = np.empty(count, np.int64)
    draws = generator.integers(shuffle_size, size=count - shuffle_size)
    for position, drawn in enumerate(draws):
        order[position] = buffer[drawn]
        buffer[drawn] = position + shuffle_size
    order[count - shuffle_size :] = generator.permutation(buffer)
    return order


def continued_order(
    count: int, shuffle_size: int, seed: int, epoch: int, length: int
) -> np.ndarray:
    """Returns the order of an epoch of `length` examples, int64 (length,).

    Each epoch continues where the previous one ended, as with `tf.data.Dataset.repeat`. So short
    epochs together visit all examples equally often. A long epoch visits them several times.
    """
    first = epoch * length
    passes = range(first // count, (first + length - 1) // count + 1)
    orders = [epoch_order(count, shuffle_size, seed, number) for number in passes]
    return np.concatenate(orders)[first - passes[0] * count :][:length]


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of each step's examples that goes to some of the devices.

    Attributes:
      replicas: number of devices that divide the examples of a step.
      first: index of the first device of this share.
      count: number of devices of this share.
      parts: batches per step. Each device processes its parts of them one after another.
    """

    replicas: int = 1
    first: int = 0
    count: int = 1
    parts: int = 1

    def rows(self, order: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Divides batches of `batch_size` examples equally among the devices.

        Short batches are padded with other examples of weight 0, so that all steps have the same
        shape. One example repeated would distort the statistics of a BatchNorm layer that takes no
        weights, in a head of the user. The number of devices does not change which batch holds an
        example.

        Args:
          order: int64 (examples,), in the order to visit them.
          batch_size: examples per batch, over all devices.

        Returns:
          Indices of examples, int64, and their weights, float32, 1 or 0. Both have the shape
          (steps * count, parts * ceil(batch_size / replicas)).
        """
        batches = -(-len(order) // (batch_size * self.parts)) * self.parts
        width = -(-batch_size // self.replicas)
        first = np.arange(batches)[:, np.newaxis] * batch_size
        counts = np.clip(len(order) - first, 0, batch_size)
        columns = np.arange(self.replicas * width)
        positions = (first + columns) % max(len(order), 1)
        weights = (columns < counts).astype(np.float32)

        def select(table: np.ndarray) -> np.ndarray:
            by_device = table.reshape(-1, self.parts, self.replicas, width).swapaxes(1, 2)
            selected = by_device[:, self.first : self.first + self.count]
            return selected.reshape(-1, self.parts * width)

        return order[select(positions)], select(weights)


def share_out(
    batches: Callable[[Share], tf.data.Dataset], strategy: tf.distribute.Strategy, parts: int = 1
) -> tf.data.Dataset | tf.distribute.DistributedDataset:
    """Distributes batches to the devices. Each worker reads only the shares of its own devices.

    Args:
      batches: returns the batches of a share, one element per device and step.
      strategy: the strategy that holds the devices.
      parts: batches per step, see `Share`.
    """
    # All elements have the same shape and all workers have the same number of them. So the workers
    # need not communicate at each step to find out whether another element follows.
    strategy.extended.experimental_enable_get_next_as_optional = False

    def of_worker(context: tf.distribute.InputContext) -> tf.data.Dataset:
        count = context.num_replicas_in_sync // context.num_input_pipelines
        first = context.input_pipeline_id * count
        return batches(Share(context.num_replicas_in_sync, first, count, parts))

    shared = strategy.distribute_datasets_from_function(of_worker)
    if isinstance(shared, tf.data.Dataset) and devices.has_gpu():
        # A strategy of several devices copies its batches ahead by itself.
        return shared.apply(tf.data.experimental.prefetch_to_device("/GPU:0", BATCHES_AHEAD))
    return shared
