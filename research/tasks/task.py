"""`Task`: head, losses, metrics and gradients. The default is single-label classification."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from research.data.batches import Batch
from research.tasks.labels import check_class_indices
from research.tasks.losses import balanced_weights, cross_entropy, label_losses, predicted_labels
from research.tasks.metrics import Means, Sums, weighted_sums

if TYPE_CHECKING:
    from research.loop.steps import Network


class Gradients(NamedTuple):
    """The sums that one device computes from its part of a batch.

    Attributes:
      values: the gradient of the scaled, weighted sum of the losses for each variable, dense.
      sums: the sums of the losses, the metrics and the weights, by name.
    """

    values: list[tf.Tensor]
    sums: Sums


class Task:
    """Defines the head, the losses, the metrics, and the gradients of one device.

    This class implements single-label classification from logits. To define another task, subclass
    it in your own file and give `--task=FILE.py:Class`; every method has a default. Methods that
    take tensors are traced by `tf.function` without AutoGraph: use `tf.where` or `tf.cond` for
    conditions that depend on tensors.

    Args:
      label_smoothing: the share of each label that is distributed over all classes, in [0, 1)
        (Szegedy et al. 2015, arXiv 1512.00567).
      class_weights: a factor for the losses of each class, by label; None for no factors.

    Attributes:
      supports: the settings that `losses` takes into account. If a subclass overrides `losses`, the
        default is none. A run that uses an unsupported setting raises an error.
      communicates: whether `gradients` exchanges values between devices, which XLA cannot compile.
    """

    supports: ClassVar[frozenset[str]] = frozenset(
        {"label_smoothing", "class_weights", "mixup", "cutmix"}
    )
    communicates: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        base = next(one for one in cls.__mro__[1:] if issubclass(one, Task))
        if cls.losses is not base.losses and "supports" not in vars(cls):
            cls.supports = frozenset()

    def __init__(
        self, label_smoothing: float = 0.0, class_weights: Sequence[float] | None = None
    ) -> None:
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights

    def make_head(
        self, feature_shape: tuple[int, ...], class_names: tuple[str, ...], seed: int
    ) -> tuple[keras.Layer, keras.Layer]:
        """Returns the pooling and the head, which follow the backbone in this order.

        A run may cache the outputs of the pooling, so the pooling must have no weights. The head is
        trained. It is called with `training`, and must return float32 logits (batch, classes), or,
        for two classes, (batch, 1): the logit of the second class.

        Args:
          feature_shape: shape of the backbone's output for one photo: (height, width, channels).
          class_names: the class names by label.
          seed: seed of the head's initial weights.
        """
        # Always float32, because the loss is computed from the logits.
        pooling = keras.layers.GlobalAveragePooling2D(dtype="float32", name="pooling")
        head = keras.layers.Dense(
            1 if len(class_names) == 2 else len(class_names),
            kernel_initializer="zeros",  # as BiT (Kolesnikov et al. 2020, arXiv 1912.11370)
            dtype="float32",
            name="head",
        )
        return pooling, head

    def check_labels(self, labels: np.ndarray, class_names: Sequence[str]) -> None:
        """Raises `UserError` if labels do not fit the built-in losses; others are not checked."""
        if type(self).losses is Task.losses:
            check_class_indices(labels, len(class_names))

    def balanced_weights(self, labels: np.ndarray, classes: int) -> tuple[float, ...]:
        """Returns the `class_weights` of --class_weights=balanced, from the training labels."""
        check_class_indices(labels, classes)
        return balanced_weights(np.bincount(labels, minlength=classes).tolist())

    def losses(self, logits: tf.Tensor, batch: Batch) -> tf.Tensor:
        """Returns the loss of each example, float32 (batch,). Training minimises the mean.

        Validation also reports it, without label smoothing and class weights.

        Args:
          logits: float32 (batch, 1), the second class's logit, or (batch, classes).
          batch: `label`; the arrays of the source by name; and, if photos are mixed, the integers
            `partner_label` and the float32 `partner_share`, both (batch,).
        """
        return label_losses(logits, batch, self.label_smoothing, self.class_weights)

    def metrics(self, logits: tf.Tensor, batch: Batch) -> dict[str, tf.Tensor]:
        """Returns values of each example by name, float32 (batch, ...), to be averaged.

        Extend `super().metrics(...)` to keep accuracy and cross-entropy, so that runs of different
        tasks can be compared.

        Args:
          logits: see `losses`.
          batch: see `losses`.
        """
        labels = tf.cast(batch["label"], tf.int32)
        correct = tf.cast(tf.equal(predicted_labels(logits), labels), tf.float32)
        return {"accuracy": correct, "cross_entropy": cross_entropy(logits, labels)}

    def figures(self, means: Means) -> Mapping[str, float]:
        """Returns the figures to report, by name, from the weighted means of `metrics`.

        By default each mean is a figure. A figure that is not a mean of examples, such as the area
        under the ROC curve, is computed here from means that add up, such as a histogram.

        Args:
          means: float64 arrays with the shape of one example's value; NaN without examples.
        """
        return {name: float(mean) for name, mean in means.items()}

    def gradients(
        self,
        network: Network,
        batch: Batch,
        variables: Sequence[keras.Variable],
        scale: tf.Tensor | float,
        values: Sequence[tf.Tensor] | None = None,
    ) -> Gradients:
        """Runs the forward and the backward pass of one device on its part of a batch.

        The caller sums over accumulated batches and devices, divides by the weights and the loss
        scale, adds the regularizers, clips the gradients and updates the variables.

        Args:
          network: the network, which is run in training mode.
          batch: this device's part of the batch.
          variables: the variables to differentiate with respect to.
          scale: a factor of the losses in the gradients. The returned sums are not scaled.
          values: one for each variable, used instead of its own value, for example by SAM. Changes
            of the network's state, such as BatchNorm's statistics, are then discarded.
        """
        at = [variable.value for variable in variables] if values is None else list(values)
        scope = (
            contextlib.nullcontext()
            if values is None
            else keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True)))
        )
        with scope, tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(at)
            sums = self.sums(network.logits(batch, training=True), batch)
            scaled = sums["loss"] * scale
        found = tape.gradient(scaled, at, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return Gradients([tf.convert_to_tensor(one) for one in found], sums)

    def sums(self, logits: tf.Tensor, batch: Batch) -> Sums:
        """Returns the weighted sums of losses and metrics over a batch, and of the weights."""
        values = {"loss": self.losses(logits, batch), **self.metrics(logits, batch)}
        return weighted_sums(values, batch["weight"])

    def for_validation(self) -> Task:
        """Returns a copy without label smoothing and class weights."""
        plain = copy.copy(self)
        plain.label_smoothing, plain.class_weights = 0.0, None
        return plain
