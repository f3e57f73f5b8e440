"""Sums values over all devices of all hosts."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from research.tasks.task import Gradients

DEVICES_THAT_GATHER = (2, 3)


def resolve_exchange(exchange: str, replicas: int) -> str:
    """Returns the number format in which a number of devices exchange gradients.

    Each of N devices sends (N - 1) · 2 bytes per gradient to gather bfloat16 values, and
    2 (N - 1) / N · 4 bytes to sum float32 values in a ring. The first is less for N < 4.

    Args:
      exchange: the requested format, `float32` or `bfloat16`.
      replicas: the number of devices of all hosts.
    """
    return exchange if replicas in DEVICES_THAT_GATHER else "float32"


def sum_over_devices(values: Any) -> Any:
    """Sums each tensor of a structure over the devices, in one all-reduce call."""
    context = tf.distribute.get_replica_context()
    flat = tf.nest.flatten(values)
    return tf.nest.pack_sequence_as(values, context.all_reduce(tf.distribute.ReduceOp.SUM, flat))


def sum_gradients(gradients: Gradients, exchange: str = "float32") -> Gradients:
    """Sums the results of `Task.gradients` over the devices, in float32.

    Args:
      gradients: the result on this device, float32.
      exchange: `bfloat16` rounds the gradients of each device before they are sent. The sums of
        losses, metrics and weights are not rounded.
    """
    if exchange == "float32":
        return sum_over_devices(gradients)
    return Gradients(_sum_of_rounded(gradients.values), sum_over_devices(gradients.sums))


def _sum_of_rounded(tensors: list[tf.Tensor]) -> list[tf.Tensor]:
    # An all-reduce of bfloat16 values would also round the sums to bfloat16.
    context = tf.distribute.get_replica_context()
    rounded = [tf.reshape(tf.cast(tensor, tf.bfloat16), [-1]) for tensor in tensors]
    # TensorFlow cannot gather bfloat16; gathering keeps the bits of float16.
    sent = tf.bitcast(tf.concat(rounded, axis=0), tf.float16)[tf.newaxis]
    received = tf.bitcast(context.all_gather(sent, axis=0), tf.bfloat16)
    # On a CPU, this takes half the time of `tf.reduce_sum`.
    rows = tf.unstack(received, context.num_replicas_in_sync)
    total = tf.add_n([tf.cast(row, tf.float32) for row in rows])
    parts = tf.split(total, [tensor.shape.num_elements() for tensor in tensors])
    return [tf.reshape(part, like.shape) for part, like in zip(parts, tensors, strict=True)]
