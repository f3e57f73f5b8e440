"""The training step and the evaluation step, written as if there were one device.

Each function runs in a replica context: on its device's part of the batch. A training step is
three of them, because each can be done only where the one before it ends: `compute_gradients` is
free of communication, so that XLA can compile it; `reduce_gradients` adds up over the devices;
`apply_gradients` is left out where float16 overflowed. `research/learner.py` strings them together
in a `tf.function`, around `strategy.run`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import keras
import tensorflow as tf

from research.batches import Batch
from research.losses import CROSS_ENTROPY, Loss
from research.metrics import Sums, weighted_sums
from research.model import Wrapper
from research.optimizers import Group
from research.split import SplitBackbone

Given = Literal["photos", "activations", "features"]


@dataclasses.dataclass(frozen=True)
class Network:
    """What a step computes with.

    Attributes:
      model: the whole model.
      parts: its backbone, cut below the first trainable layer.
      given: what the batches' `image` holds: `photos`; the trunk's `activations` for them; or the
        backbone's pooled `features`, float32 (batch, channels), where the head alone is trained.
    """

    model: Wrapper
    parts: SplitBackbone
    given: Given = "photos"

    def logits(self, batch: Batch, training: bool) -> tf.Tensor:
        """Maps a batch to float32 logits (batch, 1 or classes)."""
        return self.model.head(self.features(batch, training))

    def features(self, batch: Batch, training: bool) -> tf.Tensor:
        """Maps a batch to pooled features, float32 (batch, channels)."""
        if self.given == "features":
            return batch["image"]
        activations = self.activations(batch)
        return self.model.pooling(self.parts.features(activations, batch["weight"], training))

    def activations(self, batch: Batch) -> tuple[tf.Tensor, ...]:
        """Returns what crosses the cut: read from the batch, or computed from its photos."""
        image = batch["image"]
        if self.given == "activations":
            return image if isinstance(image, tuple) else (image,)
        return self.parts.activations(image)


class Gradients(NamedTuple):
    """What a device computes from its part of a batch; sums, which add up over parts and devices.

    Attributes:
      values: the gradients of the scaled sum of the weighted example losses, one a variable.
      sums: of loss, correct predictions and weight.
    """

    values: list[tf.Tensor]
    sums: Sums


class Update(NamedTuple):
    """What all devices agree on before the weights change.

    Attributes:
      gradients: of the mean loss and the penalties, clipped; one a variable.
      sums: over the whole batch.
      norms: the norm of each group's gradient before clipping, by name, float32 scalars.
      penalty: float32 scalar, what regularizers add to the loss.
      finite: bool scalar, whether all gradients are finite numbers.
    """

    gradients: list[tf.Tensor]
    sums: Sums
    norms: dict[str, tf.Tensor]
    penalty: tf.Tensor
    finite: tf.Tensor


def compute_gradients(
    network: Network,
    batch: Batch,
    variables: Sequence[keras.Variable],
    training: bool,
    loss_scale: tf.Tensor | float = 1.0,
    loss: Loss = CROSS_ENTROPY,
) -> Gradients:
    """Forward and backward pass over one device's part of the batch, without communication.

    (But for BatchNorm in mode `sync`, whose statistics are those of all devices.)

    Args:
      network: what to compute with.
      batch: this device's part.
      variables: what to differentiate by; nothing else is.
      training: the mode of the backbone above the cut.
      loss_scale: a factor of the loss, but not of the sums returned.
      loss: what to minimise.
    """
    values = [variable.value for variable in variables]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(values)
        logits = network.logits(batch, training)
        sums = weighted_sums(logits, batch["label"], batch["weight"], loss(logits, batch))
        scaled = sums.loss * loss_scale
    gradients = tape.gradient(scaled, values, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return Gradients(gradients, sums)


def add_gradients(first: Gradients, second: Gradients) -> Gradients:
    """Adds up what two batches gave."""
    return tf.nest.map_structure(tf.add, first, second)


def reduce_gradients(
    groups: Sequence[Group],
    gradients: Gradients,
    clip_norm: float | None = None,
    loss_scale: tf.Tensor | float = 1.0,
) -> Update:
    """Adds up over the devices, and divides once: all of them get the same update.

    Args:
      groups: whose variables the gradients belong to, in their order.
      gradients: of this device.
      clip_norm: the greatest norm of the gradient over all groups together; a greater one is
        scaled down to it (Pascanu et al. 2013, arXiv 1211.5063). None to leave it.
      loss_scale: that of `compute_gradients`, taken out again here.
    """
    variables = [variable for group in groups for variable in group.variables]
    *totals, loss, correct, weight = _sum_over_devices([*gradients.values, *gradients.sums])
    means = [tf.math.divide_no_nan(total / loss_scale, weight) for total in totals]
    finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(mean)) for mean in means])
    penalty, slopes = _penalties(variables)
    means = [
        mean if slope is None else mean + slope for mean, slope in zip(means, slopes, strict=True)
    ]
    norms, rest = {}, means
    for group in groups:
        own, rest = rest[: len(group.variables)], rest[len(group.variables) :]
        norms[group.name] = tf.linalg.global_norm(own)
    if clip_norm is not None:
        norm = tf.linalg.global_norm(list(norms.values()))
        means, _ = tf.clip_by_global_norm(means, clip_norm, use_norm=norm)
    return Update(means, Sums(loss, correct, weight), norms, penalty, finite)


def apply_gradients(groups: Sequence[Group], gradients: Sequence[tf.Tensor]) -> None:
    """Lets each group's optimizer update its variables."""
    rest = list(gradients)
    for group in groups:
        own, rest = rest[: len(group.variables)], rest[len(group.variables) :]
        group.apply(own)


def eval_step(network: Network, batch: Batch) -> Sums:
    """Returns the batch's sums over all devices, in inference mode."""
    sums = weighted_sums(predict_step(network, batch), batch["label"], batch["weight"])
    return Sums(*_sum_over_devices(list(sums)))


def predict_step(network: Network, batch: Batch) -> tf.Tensor:
    """Returns the batch's logits, float32 (batch, 1 or classes), in inference mode.

    Where a batch has mirror images too, they are the mean of both.
    """
    logits = network.logits(batch, training=False)
    if "mirrored" in batch:
        mirrored = network.logits({**batch, "image": batch["mirrored"]}, training=False)
        logits = (logits + mirrored) / 2
    return logits


def _sum_over_devices(values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    context = tf.distribute.get_replica_context()
    return list(context.all_reduce(tf.distribute.ReduceOp.SUM, list(values)))


def _penalties(
    variables: Sequence[keras.Variable],
) -> tuple[tf.Tensor, list[tf.Tensor | None]]:
    """Returns the sum of the variables' regularizers and its gradient, None where there is none.

    A penalty is no mean over photos: it is added once, not once a device or part of a batch.
    """
    values = [variable.value for variable in variables]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(values)
        penalty = tf.add_n(
            [
                tf.zeros([]),
                *(
                    tf.cast(variable.regularizer(variable.value), tf.float32)
                    for variable in variables
                    if variable.regularizer is not None
                ),
            ]
        )
    return penalty, tape.gradient(penalty, values)
