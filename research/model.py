"""`Wrapper`: a backbone, pooling and a new head; and what of it is trained."""

from __future__ import annotations

import dataclasses

import keras
import tensorflow as tf


class Wrapper(keras.Model):
    """Classifies photos: backbone, global average pooling, one dense layer of float32 logits.

    Args:
      base_model: a Keras model from images to features (batch, height, width, channels).
      num_classes: two classes get one logit, that of the second class; more get one each.
      seed: of the head's initial weights.
    """

    def __init__(self, base_model: keras.Model, num_classes: int = 2, seed: int = 0) -> None:
        super().__init__(name="wrapper")
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; expected at least 2")
        self.backbone = base_model
        # The head computes in float32 under every precision: logits decide the loss.
        self.pooling = keras.layers.GlobalAveragePooling2D(dtype="float32", name="pooling")
        self.head = keras.layers.Dense(
            1 if num_classes == 2 else num_classes,
            kernel_initializer=keras.initializers.GlorotUniform(seed=seed),
            dtype="float32",
            name="head",
        )
        # Built here, under the caller's strategy scope: the first step must create nothing.
        self.head.build((None, base_model.output_shape[-1]))
        self.built = True

    def call(self, image: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Maps preprocessed images (batch, height, width, 3) to logits (batch, 1 or classes)."""
        return self.head(self.pooling(self.backbone(image, training=training)))


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
