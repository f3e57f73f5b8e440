"""Cuts a backbone in two: a trunk that never changes, and the rest, which is trained."""

from __future__ import annotations

import dataclasses

import keras
import tensorflow as tf

from research.folding import fold_frozen_batch_norm

Activations = tuple[tf.Tensor, ...]


@dataclasses.dataclass(frozen=True)
class SplitBackbone:
    """A backbone in two parts that share its variables.

    Attributes:
      trunk: images to the activations that cross the cut; None if nothing is below the cut.
      rest: activations to features; None if nothing is above the cut.
    """

    trunk: keras.Model | None
    rest: keras.Model | None

    def activations(self, image: tf.Tensor) -> Activations:
        """Runs the trunk in inference mode: the tensors that cross the cut, one or several."""
        if self.trunk is None:
            return (image,)
        return tuple(tf.nest.flatten(self.trunk(image, training=False)))

    def features(self, activations: Activations, training: bool) -> tf.Tensor:
        """Runs the rest: the backbone's output, (batch, height, width, channels)."""
        if self.rest is None:
            return activations[0]
        # Keras wants a single input as itself, several as a list.
        inputs = activations[0] if len(activations) == 1 else list(activations)
        return self.rest(inputs, training=training)


def crossing_tensors(model: keras.Model, index: int) -> list[keras.KerasTensor]:
    """Returns the tensors that lead from below `model.layers[index]` to it or above, each once.

    Seen by operation, not by layer: ConvNeXt and MobileNetV3 add and multiply between layers.
    Read from each operation's first node, which is the whole model's own: building a part of the
    model adds nodes to the layers that it shares.
    """
    operations = model.operations
    start = operations.index(model.layers[index])
    below = {id(operation) for operation in operations[:start]}
    crossing: dict[int, keras.KerasTensor] = {}
    for operation in operations[start:]:
        for tensor in operation._inbound_nodes[0].input_tensors:
            if id(tensor._keras_history.operation) in below:
                crossing.setdefault(id(tensor), tensor)
    return list(crossing.values())


def split_backbone(model: keras.Model, index: int) -> SplitBackbone:
    """Splits a functional model below `model.layers[index]`, and folds what is frozen.

    Args:
      model: a functional Keras model with one input and one output.
      index: 0 to len(model.layers): the number of layers that belong to the trunk.
    """
    inputs = sum(isinstance(layer, keras.layers.InputLayer) for layer in model.layers[:index])
    if index <= inputs:
        return SplitBackbone(None, fold_frozen_batch_norm(model))
    if index >= len(model.layers):
        return SplitBackbone(fold_frozen_batch_norm(model), None)
    crossing = crossing_tensors(model, index)
    trunk = keras.Model(model.input, crossing, name=f"{model.name}_trunk")
    rest = keras.Model(crossing, model.output, name=f"{model.name}_rest")
    return SplitBackbone(fold_frozen_batch_norm(trunk), fold_frozen_batch_norm(rest))
