"""The training step and the evaluation step, written as if there were one device.

Each function runs in a replica context: on its device's part of the batch. A training step has
three parts. `Task.gradients` computes without communication, so that XLA can compile it;
`reduce_gradients` adds up over the devices; `apply_gradients` is skipped if float16 overflowed.
`learner.py` puts them together in a `tf.function`, around `strategy.run`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import tensorflow as tf

from research.data.batches import Batch
from research.models.split import SplitBackbone
from research.models.wrapper import Wrapper
from research.optimization.groups import Group, penalties
from research.tasks.metrics import Sums
from research.tasks.task import Gradients, Task

InputKind = Literal["photos", "activations", "features"]


@dataclasses.dataclass(frozen=True)
class Network:
    """What a step computes with.

    Attributes:
      model: the whole model.
      parts: its backbone, cut below the first trainable layer.
      input_kind: what `batch["image"]` holds: `photos`; the `activations` that the frozen trunk
        computes from them; or the `features` that go into the head, if only the head is trained.
      trains_backbone: False while the head alone is trained. The backbone then runs in inference
        mode also in training steps.
    """

    model: Wrapper
    parts: SplitBackbone
    input_kind: InputKind = "photos"
    trains_backbone: bool = True

    def logits(self, batch: Batch, training: bool) -> tf.Tensor:
        """Maps a batch to float32 logits (batch, 1 or classes).

        Args:
          batch: photos, activations or features, as `given` says.
          training: the mode of the head, and of the backbone if it is trained.
        """
        return self.model.head(self.features(batch, training), training=training)

    def features(self, batch: Batch, training: bool) -> tf.Tensor:
        """Maps a batch to what the head takes: float32 (batch, channels) for the built-in head."""
        if self.input_kind == "features":
            return batch["image"]
        mode = training and self.trains_backbone
        activations = self.activations(batch)
        return self.model.pooling(self.parts.features(activations, batch["weight"], mode))

    def activations(self, batch: Batch) -> tuple[tf.Tensor, ...]:
        """Returns what crosses the cut: read from the batch, or computed from its photos."""
        image = batch["image"]
        if self.input_kind == "activations":
            return image if isinstance(image, tuple) else (image,)
        return self.parts.activations(image)


class Update(NamedTuple):
    """An update of the weights, the same on all devices.

    Attributes:
      gradients: of the mean loss and the penalties, clipped; one for each variable.
      sums: over the whole batch.
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
    """Adds up the results of two batches."""
    return tf.nest.map_structure(tf.add, first, second)


def reduce_gradients(
    groups: Sequence[Group],
    gradients: Gradients,
    clip_norm: float | None = None,
    loss_scale: tf.Tensor | float = 1.0,
) -> Update:
    """Adds up over the devices, and divides by the weights once.

    Args:
      groups: whose variables the gradients belong to, in their order.
      gradients: of this device.
      clip_norm: the greatest norm of the gradient over all groups together. A longer gradient is
        scaled down to it (Pascanu et al. 2013, arXiv 1211.5063). None for no limit.
      loss_scale: the factor that `Task.gradients` was given; it is divided out here.
    """
    variables = [variable for group in groups for variable in group.variables]
    totals, sums = _sum_over_devices(gradients)
    means = [tf.math.divide_no_nan(total / loss_scale, sums["weight"]) for total in totals]
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
    """Lets each group's optimizer update its variables."""
    rest = list(gradients)
    for group in groups:
        own, rest = rest[: len(group.variables)], rest[len(group.variables) :]
        group.apply(own)


def eval_step(task: Task, network: Network, batch: Batch) -> Sums:
    """Returns the batch's sums over all devices, in inference mode."""
    return _sum_over_devices(task.sums(predict_step(network, batch), batch))


def predict_step(network: Network, batch: Batch) -> tf.Tensor:
    """Returns the batch's logits, float32 (batch, 1 or classes), in inference mode.

    If the batch has mirror images too, the logits are the mean of both.
    """
    logits = network.logits(batch, training=False)
    if "mirrored" in batch:
        mirrored = network.logits({**batch, "image": batch["mirrored"]}, training=False)
        logits = (logits + mirrored) / 2
    return logits


def _sum_over_devices(values: Any) -> Any:
    """Adds up each tensor of a structure over the devices, in one exchange."""
    context = tf.distribute.get_replica_context()
    flat = tf.nest.flatten(values)
    return tf.nest.pack_sequence_as(values, context.all_reduce(tf.distribute.ReduceOp.SUM, flat))
