"""`Wrapper`: a backbone, pooling and a new head; and which of its variables are trained."""

from __future__ import annotations

import dataclasses

import keras
import tensorflow as tf

from research.system.errors import UserError
from research.tasks.task import Task


class Wrapper(keras.Model):
    """Classifies photos: a backbone, pooling, and a new head of float32 logits.

    Args:
      base_model: a Keras model from images to features (batch, height, width, channels).
      num_classes: the number of classes, where their names do not matter.
      seed: of the head's initial weights.
      task: makes pooling and head; by default global average pooling and one dense layer.
      class_names: by label; by default `num_classes` numbers.

    Attributes:
      feature_shape: what the head takes for one photo.
      logits: how many the head returns for one photo.

    Raises:
      UserError: the task's pooling has weights, or its head does not give logits of these classes.
    """

    def __init__(
        self,
        base_model: keras.Model,
        num_classes: int = 2,
        seed: int = 0,
        task: Task | None = None,
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__(name="wrapper")
        names = class_names or tuple(map(str, range(num_classes)))
        if len(names) < 2:
            raise ValueError(f"num_classes is {len(names)}; expected at least 2")
        task = task or Task()
        self.backbone = base_model
        self.pooling, self.head = task.make_head(base_model.output_shape[1:], names, seed)
        # Called once here, under the caller's strategy scope: the first step must create nothing.
        image = keras.Input(base_model.output_shape[1:])
        pooled = self.pooling(image)
        logits = self.head(pooled, training=False)
        self.built = True
        self.feature_shape: tuple[int, ...] = tuple(pooled.shape[1:])
        self.logits: int = logits.shape[-1]
        kind = f"the task {type(task).__name__}"
        if self.pooling.weights:
            raise UserError(
                f"{kind} makes a pooling with weights, which would never be trained; put layers "
                "that learn into the head"
            )
        sizes = (1, 2) if len(names) == 2 else (len(names),)
        if len(logits.shape) != 2 or logits.shape[1] not in sizes or logits.dtype != "float32":
            raise UserError(
                f"{kind} makes a head that returns {logits.dtype} {logits.shape}; expected float32 "
                f"logits (batch, {' or '.join(map(str, sizes))}): give the last layer as many "
                'units, and dtype="float32"'
            )

    def call(self, image: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Maps preprocessed images (batch, height, width, 3) to logits (batch, 1 or classes)."""
        features = self.pooling(self.backbone(image, training=training))
        return self.head(features, training=training)


def freeze_below(backbone: keras.Model, index: int, bn_mode: str) -> None:
    """Freezes `backbone.layers[:index]` and makes the layers above trainable.

    Args:
      backbone: the model whose layers are set.
      index: the first trainable layer.
      bn_mode: what BatchNorm does above: `frozen` keeps its statistics, scale and offset as they
        are; `train` learns them from each device's part of the batch; `sync` from the whole.
    """
    backbone.trainable = True
    for position, layer in enumerate(backbone.layers):
        layer.trainable = position >= index
        for inner in layer._flatten_layers():
            if isinstance(inner, keras.layers.BatchNormalization):
                inner.trainable = layer.trainable and bn_mode != "frozen"
                inner.synchronized = bn_mode == "sync"


def penalize(model: Wrapper, l2_penalty: float) -> None:
    """Adds `l2_penalty` times the squared weights of every trained kernel to the loss, if not 0.

    As `keras.regularizers.L2` does it; biases, and the scales and offsets of norms, are spared.
    """
    if l2_penalty:
        for variable in model.trainable_variables:
            if len(variable.shape) > 1:
                variable.regularizer = keras.regularizers.L2(l2_penalty)


@dataclasses.dataclass(frozen=True)
class PartSummary:
    """What one line of the table of frozen and trained parts says."""

    name: str
    layers: int
    parameters: int


def summarize_parts(model: Wrapper, index: int) -> tuple[PartSummary, ...]:
    """Counts layers and parameters: frozen, unfrozen backbone (its frozen BatchNorm apart), head.

    The parameters add up to those of the model.
    """
    total = model.backbone.count_params()
    trained = sum(variable.value.shape.num_elements() for variable in trained_backbone(model))
    unfrozen = model.backbone.layers[index:]
    below = sum(layer.count_params() for layer in model.backbone.layers[:index])
    return (
        PartSummary("frozen", index, below),
        PartSummary("backbone", len(unfrozen), trained),
        PartSummary("backbone, not trained", 0, total - trained - below),
        PartSummary("head", 1, model.head.count_params()),
    )


def trained_statistics(model: Wrapper) -> list[keras.Variable]:
    """Returns the moving means and variances that training changes."""
    return [
        variable
        for layer in model.backbone._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
        for variable in (layer.moving_mean, layer.moving_variance)
    ]


def trained_backbone(model: Wrapper) -> list[keras.Variable]:
    """Returns the backbone variables that are trained, in the order of the layers."""
    return list(model.backbone.trainable_variables)
