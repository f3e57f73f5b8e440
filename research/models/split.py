"""Cuts a backbone in two: a trunk that never changes, and the rest, which is trained."""

from __future__ import annotations

import dataclasses
import math

import keras
import tensorflow as tf

from research.models.batch_norm import takes_weights, weigh_batch_norm
from research.models.cost import forward_cost
from research.models.folding import fold_frozen_batch_norm

# About a block of a mobile network.
LAYERS_TO_RUN_AGAIN = 10

Activations = tuple[tf.Tensor, ...]


@dataclasses.dataclass(frozen=True)
class SplitBackbone:
    """A backbone in two parts that share its variables.

    Attributes:
      trunk: images to the activations that cross the cut; None if nothing is below the cut.
      rest: activations to features; None if nothing is above the cut.
      trunk_cost: what the trunk costs for one photo, in operations; see `forward_cost`.
      rest_cost: what the rest costs, forward only.
      crossing: the names of the layers whose outputs cross the cut.
    """

    trunk: keras.Model | None
    rest: keras.Model | None
    trunk_cost: float
    rest_cost: float
    crossing: tuple[str, ...]

    def activations(self, image: tf.Tensor) -> Activations:
        """Runs the trunk in inference mode: the tensors that cross the cut, one or several."""
        if self.trunk is None:
            return (image,)
        return tuple(tf.nest.flatten(self.trunk(image, training=False)))

    def features(self, activations: Activations, weight: tf.Tensor, training: bool) -> tf.Tensor:
        """Runs the rest: the backbone's output, (batch, height, width, channels).

        Args:
          activations: what crosses the cut.
          weight: of the examples, float32 (batch,), for a BatchNorm that is trained.
          training: the mode to run in.
        """
        if self.rest is None:
            return activations[0]
        inputs = [*activations, weight] if takes_weights(self.rest) else list(activations)
        # Keras wants a single input as itself, several as a list.
        return self.rest(inputs[0] if len(inputs) == 1 else inputs, training=training)


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


def cheapest_cut(model: keras.Model, index: int) -> int:
    """Returns where to cut at or a little below `model.layers[index]`, so that least data crosses.

    Within a block several large tensors cross; where it begins, a small one. Running the few
    frozen layers between again costs less than moving what they make. Layers that drop something
    at random are not passed: above the cut they would do so in training.
    """
    sizes = {index: _crossing_size(model, index)}
    for lower in range(index - 1, max(index - LAYERS_TO_RUN_AGAIN, 1), -1):
        if hasattr(model.layers[lower], "rate"):
            break
        sizes[lower] = _crossing_size(model, lower)
    return min(sizes, key=lambda cut: (sizes[cut], -cut))


def _crossing_size(model: keras.Model, index: int) -> int:
    return sum(math.prod(tensor.shape[1:]) for tensor in crossing_tensors(model, index))


def split_backbone(model: keras.Model, index: int) -> SplitBackbone:
    """Splits a functional model at or a little below a layer, and folds what is frozen.

    Args:
      model: a functional Keras model with one input and one output.
      index: the first trainable layer, 0 to len(model.layers).
    """
    inputs = sum(isinstance(layer, keras.layers.InputLayer) for layer in model.layers[:index])
    if index <= inputs:
        return SplitBackbone(None, _prepare(model), 0.0, forward_cost(model.layers), ())
    if index >= len(model.layers):
        cost = forward_cost(model.layers)
        return SplitBackbone(fold_frozen_batch_norm(model), None, cost, 0.0, ("output",))
    cut = cheapest_cut(model, index)
    crossing = crossing_tensors(model, cut)
    trunk = keras.Model(model.input, crossing, name=f"{model.name}_trunk")
    rest = keras.Model(crossing, model.output, name=f"{model.name}_rest")
    return SplitBackbone(
        fold_frozen_batch_norm(trunk),
        _prepare(rest),
        forward_cost(model.layers[:cut]),
        forward_cost(model.layers[cut:]),
        tuple(tensor._keras_history.operation.name for tensor in crossing),
    )


def _prepare(rest: keras.Model) -> keras.Model:
    return fold_frozen_batch_norm(weigh_batch_norm(rest))
