"""The training step and the evaluation step, written as if there were one device.

Each runs in a replica context: on its device's part of the batch, with sums over the devices where
they are needed. `research/learner.py` wraps them in `tf.function` and `strategy.run`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import keras
import tensorflow as tf

from research.batches import Batch
from research.metrics import Sums, weighted_sums
from research.model import Wrapper
from research.optimizers import Group
from research.split import SplitBackbone


@dataclasses.dataclass(frozen=True)
class Network:
    """What a step computes with.

    Attributes:
      model: the whole model.
      parts: its backbone, cut below the first trainable layer.
      from_trunk: the batches' `image` holds the trunk's activations, not photos.
    """

    model: Wrapper
    parts: SplitBackbone
    from_trunk: bool = False

    def logits(self, activations: tuple[tf.Tensor, ...], training: bool) -> tf.Tensor:
        """Maps what crosses the cut to float32 logits (batch, 1 or classes)."""
        return self.model.classify(self.parts.features(activations, training))

    def activations(self, batch: Batch) -> tuple[tf.Tensor, ...]:
        """Returns what crosses the cut: read from the batch, or computed from its photos."""
        image = batch["image"]
        if self.from_trunk:
            return image if isinstance(image, tuple) else (image,)
        return self.parts.activations(image)


def sum_over_replicas(values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Sums each value over the devices; all of them get the result."""
    context = tf.distribute.get_replica_context()
    return list(context.all_reduce(tf.distribute.ReduceOp.SUM, list(values)))


def compute_gradients(
    network: Network, batch: Batch, variables: Sequence[keras.Variable], training: bool
) -> tuple[list[tf.Tensor], Sums]:
    """Forward and backward pass over one device's part of the batch.

    Args:
      network: what to compute with.
      batch: this device's part.
      variables: what to differentiate by.
      training: the mode of the backbone above the cut.

    Returns:
      The gradients of the *sum* of the weighted example losses, one a variable, and the sums of
      loss, correct predictions and weight. Sums, unlike means, add up over uneven parts.
    """
    activations = network.activations(batch)  # the trunk is frozen: no tape needs to see it
    values = [variable.value for variable in variables]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(values)
        logits = network.logits(activations, training)
        sums = weighted_sums(logits, batch["label"], batch["weight"])
    gradients = tape.gradient(sums.loss, values, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return gradients, sums


def train_step(
    network: Network, groups: Sequence[Group], batch: Batch
) -> tuple[Sums, dict[str, tf.Tensor]]:
    """Updates every group's variables by the mean loss over the whole batch.

    Returns:
      The batch's sums over all devices, and each group's gradient norm by name, float32
      scalars.
    """
    variables = [variable for group in groups for variable in group.variables]
    # While the head is trained alone, the backbone's BatchNorm and Dropout rest too.
    training = any(group.name == "backbone" for group in groups)
    gradients, sums = compute_gradients(network, batch, variables, training)
    *gradients, loss, correct, weight = sum_over_replicas([*gradients, *sums])
    gradients = [tf.math.divide_no_nan(gradient, weight) for gradient in gradients]
    norms = {}
    for group in groups:
        count = len(group.variables)
        own, gradients = gradients[:count], gradients[count:]
        norms[group.name] = tf.linalg.global_norm(own)
        group.apply(own)
    return Sums(loss, correct, weight), norms


def eval_step(network: Network, batch: Batch) -> Sums:
    """Returns the batch's sums over all devices, in inference mode."""
    logits = network.logits(network.activations(batch), training=False)
    sums = weighted_sums(logits, batch["label"], batch["weight"])
    return Sums(*sum_over_replicas(list(sums)))
