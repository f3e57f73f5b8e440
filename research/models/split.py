"""Splits a backbone in two parts: a trunk of frozen layers, and the rest, which is trained."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
from collections.abc import Sequence

import keras
import tensorflow as tf

from research.models.batch_norm import takes_weights, weigh_batch_norm
from research.models.cost import forward_cost
from research.models.fast_layers import with_fast_layers
from research.models.recompute import cut_into_blocks, run_blocks

# About one block of a mobile network.
MAX_LAYERS_TO_REPEAT = 10
# Dense layers have the argument `training` for quantization; models pass it to their layers.
SAME_IN_TRAINING = (
    keras.layers.BatchNormalization,
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.Model,
)

Activations = tuple[tf.Tensor, ...]


@dataclasses.dataclass(frozen=True)
class SplitBackbone:
    """A backbone in two parts that share its variables.

    Attributes:
      trunk: maps images to the activations at the cut; None if no layer is below the cut.
      rest: maps these activations to features; None if no layer is above the cut.
      trunk_cost: cost of the trunk for one photo, in operations; see `forward_cost`.
      rest_cost: cost of the forward pass of the rest.
      crossing: names of the layers whose outputs are the activations at the cut.
      blocks: the rest, cut into blocks that training computes again in the backward pass, except
        the last; none to keep all activations.
    """

    trunk: keras.Model | None
    rest: keras.Model | None
    trunk_cost: float
    rest_cost: float
    crossing: tuple[str, ...]
    blocks: tuple[keras.Model, ...] = ()

    def activations(self, image: tf.Tensor) -> Activations:
        """Runs the trunk in inference mode and returns the activations at the cut."""
        if self.trunk is None:
            return (image,)
        return tuple(tf.nest.flatten(self.trunk(image, training=False)))

    def features(self, activations: Activations, weight: tf.Tensor, training: bool) -> tf.Tensor:
        """Runs the rest and returns the features (batch, height, width, channels).

        Args:
          activations: the activations at the cut.
          weight: example weights for trained BatchNorm layers, float32 (batch,).
          training: whether to run in training mode.
        """
        if self.rest is None:
            return activations[0]
        if training and self.blocks:
            return run_blocks(self.blocks, activations)
        inputs = [*activations, weight] if takes_weights(self.rest) else list(activations)
        # Keras expects a single input without a list.
        return self.rest(inputs[0] if len(inputs) == 1 else inputs, training=training)

    def resized(self, image_size: int) -> SplitBackbone:
        """Returns the parts for photos of another size, for evaluation; all layers are shared.

        Both sizes must be multiples of 32, because a padding of layers with strides depends on
        whether a size is even.

        Raises:
          ValueError: a layer does not take the size.
        """
        shapes = [(image_size, image_size, 3)]
        trunk = rest = None
        if self.trunk is not None:
            trunk = _with_inputs(self.trunk, shapes)
            shapes = [tensor.shape[1:] for tensor in trunk.outputs]
        if self.rest is not None:
            others = [tensor.shape[1:] for tensor in self.rest.inputs[len(shapes) :]]
            rest = _with_inputs(self.rest, [*shapes, *others])
        return dataclasses.replace(self, trunk=trunk, rest=rest, blocks=())


def _with_inputs(model: keras.Model, shapes: Sequence[tuple[int, ...]]) -> keras.Model:
    """Returns a functional model of the same layers for inputs of other shapes."""
    pairs = zip(model.inputs, shapes, strict=True)
    inputs = [keras.Input(shape, dtype=tensor.dtype) for tensor, shape in pairs]
    given = inputs if isinstance(model.input, list) else inputs[0]
    return keras.models.clone_model(model, input_tensors=given, clone_function=lambda layer: layer)


def crossing_tensors(model: keras.Model, index: int) -> list[keras.KerasTensor]:
    """Returns the outputs of layers below `model.layers[index]` that it or later layers use.

    The graph is read by operation and not by layer, because ConvNeXt and MobileNetV3 add and
    multiply between layers. Only the first node of each operation is read. It belongs to the whole
    model; building a part of the model adds nodes to the shared layers.
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
    """Returns the cut at or a little below `model.layers[index]` with the smallest activations.

    Inside a block, several large tensors cross the cut; at the beginning of a block, one small
    tensor does. Running a few frozen layers again costs less than moving their output. The cut does
    not move below a layer that is random in training, such as dropout, which would then run in this
    mode.
    """

    def crossing_size(cut: int) -> int:
        return sum(math.prod(tensor.shape[1:]) for tensor in crossing_tensors(model, cut))

    lower = range(index - 1, max(index - MAX_LAYERS_TO_REPEAT, 1), -1)
    allowed = itertools.takewhile(lambda cut: not may_be_random(model.layers[cut]), lower)
    return min([index, *allowed], key=crossing_size)


def may_be_random(layer: keras.layers.Layer) -> bool:
    """Returns whether a layer, or one inside it, may compute something else in training.

    BatchNorm is not meant: it does so only where it is trained.
    """
    return any(
        "training" in inspect.signature(one.call).parameters
        and not isinstance(one, SAME_IN_TRAINING)
        for one in layer._flatten_layers()
    )


def split_backbone(model: keras.Model, index: int, recompute: bool = False) -> SplitBackbone:
    """Splits a functional model at a layer or a little below it, and folds frozen BatchNorm layers.

    Args:
      model: a functional Keras model with one input and one output.
      index: the first trainable layer, 0 to len(model.layers).
      recompute: whether training computes activations again in the backward pass. BatchNorm must
        be frozen then.
    """
    inputs = sum(isinstance(layer, keras.layers.InputLayer) for layer in model.layers[:index])
    cost = forward_cost(model.layers)
    if index >= len(model.layers):
        return SplitBackbone(with_fast_layers(model), None, cost, 0.0, ("output",))
    if index <= inputs:
        parts = SplitBackbone(None, with_fast_layers(weigh_batch_norm(model)), 0.0, cost, ())
    else:
        parts = _split(model, cheapest_cut(model, index))
    blocks = cut_into_blocks(parts.rest) if recompute else ()
    return dataclasses.replace(parts, blocks=blocks if len(blocks) > 1 else ())


def _split(model: keras.Model, cut: int) -> SplitBackbone:
    crossing = crossing_tensors(model, cut)
    trunk = keras.Model(model.input, crossing, name=f"{model.name}_trunk")
    rest = keras.Model(crossing, model.output, name=f"{model.name}_rest")
    return SplitBackbone(
        with_fast_layers(trunk),
        with_fast_layers(weigh_batch_norm(rest)),
        forward_cost(model.layers[:cut]),
        forward_cost(model.layers[cut:]),
        tuple(tensor._keras_history.operation.name for tensor in crossing),
    )
