"""The training step and the evaluation step of one device.

Each function runs in a replica context, on its device's part of the batch. A training step has
three parts: `Task.gradients` usually needs no communication, so XLA compiles it on any devices;
`reduce_gradients` sums over the devices; `apply_gradients` is skipped if float16 overflowed.
`learner.py` combines them in a `tf.function` that calls `strategy.run` for each part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import tensorflow as tf

from research.data.batches import Batch
from research.loop.exchange import sum_gradients, sum_over_devices
from research.models.split import SplitBackbone
from research.models.wrapper import Wrapper
from research.optimization.groups import Group, penalties
from research.tasks.metrics import Sums
from research.tasks.task import Gradients, Task

InputKind = Literal["photos", "activations", "features"]


@dataclasses.dataclass(frozen=True)
class Network:
    """A model, and the kind of input that the steps feed to it.

    Attributes:
      model: the whole model.
      parts: its backbone, split below the first trainable layer.
      input_kind: what `batch["image"]` holds: `photos`; the `activations` that the frozen trunk
        computes from them; or the `features` that go into the head, if only the head is trained.
      trains_backbone: False while only the head is trained: the backbone is in inference mode.
    """

    model: Wrapper
    parts: SplitBackbone
    input_kind: InputKind = "photos"
    trains_backbone: bool = True

    def logits(self, batch: Batch, training: bool) -> tf.Tensor:
        """Maps a batch to float32 logits (batch, 1 or classes).

        Args:
          batch: photos, activations or features; see `input_kind`.
          training: the mode of the head, and of the backbone if it is trained.
        """
        return self.model.head(self.features(batch, training), training=training)

    def features(self, batch: Batch, training: bool) -> tf.Tensor:
        """Maps a batch to the head's input: float32 (batch, channels) for the built-in head."""
        if self.input_kind == "features":
            return batch["image"]
        mode = training and self.trains_backbone
        activations = self.activations(batch)
        return self.model.pooling(self.parts.features(activations, batch["weight"], mode))

    def activations(self, batch: Batch) -> tuple[tf.Tensor, ...]:
        """Returns the activations at the cut: from the batch, or computed from its photos."""
        image = batch["image"]
        if self.input_kind == "activations":
            return image if isinstance(image, tuple) else (image,)
        return self.parts.activations(image)


class Update(NamedTuple):
    """An update of the weights, the same on all devices.

    Attributes:
      gradients: clipped gradients of the mean loss and the penalties, one for each variable.
      sums: the sums of losses, metrics and weights over the whole batch.
      norms: the norm of each group's gradient before clipping, by name, float32 scalars.
      penalty: float32 scalar, the sum of the regularizers.
      finite: bool scalar, whether all gradients are finite.
    """

    gradients: list[tf.Tensor]
    sums: Sums
    norms: dict[str, tf.Tensor]
    penalty: tf.Tensor
    finite: tf.Tensor


def add_gradients(first: Gradients, second: Gradients) -> Gradients:
    """Adds the results of two batches."""
    return tf.nest.map_structure(tf.add, first, second)


def reduce_gradients(
    groups: Sequence[Group],
    gradients: Gradients,
    clip_norm: float | None = None,
    loss_scale: tf.Tensor | float = 1.0,
    exchange: str = "float32",
) -> Update:
    """Sums gradients over the devices, divides by the total weight, and clips them.

    Args:
      groups: the parameter groups, whose variables have the order of the gradients.
      gradients: the result of `Task.gradients` on this device.
      clip_norm: the largest norm of the gradient over all groups together. A larger gradient is
        scaled down to it (Pascanu et al. 2013, arXiv 1211.5063). None for no limit.
      loss_scale: the `scale` given to `Task.gradients`. The gradients are divided by it.
      exchange: the number format in which gradients are sent; see `sum_gradients`.
    """
    variables = [variable for group in groups for variable in group.variables]
    totals, sums = sum_gradients(gradients, exchange)
    means = [tf.math.divide_no_nan(total, loss_scale * sums["weight"]) for total in totals]
    finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(mean)) for mean in means])
    penalty, slopes = penalties(variables)
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
    return Update(means, sums, norms, penalty, finite)


def apply_gradients(groups: Sequence[Group], gradients: Sequence[tf.Tensor]) -> None:
    """Updates the variables of each group with its optimizer."""
    rest = list(gradients)
    for group in groups:
        own, rest = rest[: len(group.variables)], rest[len(group.variables) :]
        group.apply(own)


def eval_step(task: Task, network: Network, batch: Batch) -> Sums:
    """Returns the sums of a batch over all devices, in inference mode."""
    return sum_over_devices(task.sums(predict_step(network, batch), batch))


def predict_step(network: Network, batch: Batch) -> tf.Tensor:
    """Returns the logits of a batch, float32 (batch, 1 or classes), in inference mode.

    If the batch also has mirror images, the logits are averaged over both images.
    """
    if "mirrored" not in batch:
        return network.logits(batch, training=False)
    # One pass over both images is traced and compiled in half the time of two.
    mirrored = {**batch, "image": batch["mirrored"]}
    both = tf.nest.map_structure(lambda *pair: tf.concat(pair, axis=0), batch, mirrored)
    return tf.reduce_mean(tf.split(network.logits(both, training=False), 2), axis=0)
