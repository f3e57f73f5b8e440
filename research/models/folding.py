"""Puts a frozen BatchNorm into the convolution before it, where it costs nothing."""

from __future__ import annotations

import collections
from typing import Any

import keras
import tensorflow as tf


class FoldedConvolution(keras.layers.Layer):
    """A convolution and the frozen BatchNorm after it, as one convolution with a bias.

    With frozen statistics BatchNorm is a scale and an offset a channel. Scaling the kernel is far
    cheaper than scaling the activations, and leaves a form that oneDNN computes together with the
    ReLU after it. The variables are those of the two layers; the kernel stays trainable.

    Args:
      convolution: a `Conv2D` or `DepthwiseConv2D` without activation.
      norm: the `BatchNormalization` that takes its output.
    """

    def __init__(
        self, convolution: keras.layers.Layer, norm: keras.layers.BatchNormalization
    ) -> None:
        super().__init__(name=f"{convolution.name}_folded", dtype=convolution.dtype_policy)
        self.convolution = convolution
        self.norm = norm
        self.built = True

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Maps (batch, height, width, channels) to what the two layers would, to rounding."""
        convolution, norm = self.convolution, self.norm
        scale = tf.math.rsqrt(norm.moving_variance + norm.epsilon)
        if norm.scale:
            scale *= norm.gamma
        offset = -norm.moving_mean * scale
        if norm.center:
            offset += norm.beta
        if convolution.use_bias:
            offset += convolution.bias * scale
        depthwise = isinstance(convolution, keras.layers.DepthwiseConv2D)
        # A depthwise kernel has the shape (height, width, channels, 1).
        kernel = convolution.kernel * (scale[:, tf.newaxis] if depthwise else scale)
        convolve = keras.ops.depthwise_conv if depthwise else keras.ops.conv
        outputs = convolve(
            inputs,
            kernel,
            strides=convolution.strides,
            padding=convolution.padding,
            dilation_rate=convolution.dilation_rate,
            data_format="channels_last",
        )
        return tf.nn.bias_add(outputs, offset)


def fold_frozen_batch_norm(model: keras.Model) -> keras.Model:
    """Returns a model that computes the same, without its frozen BatchNorm layers where it can.

    It shares all layers and variables with the original. BatchNorm that is trained, or that does
    not directly follow a convolution of its own, stays as it is.
    """
    pairs = _foldable_pairs(model)
    if not pairs:
        return model
    folded = {id(convolution) for convolution in pairs}
    norms = {id(norm) for norm in pairs.values()}

    def replace(layer: keras.layers.Layer) -> keras.layers.Layer:
        if id(layer) in folded:
            return FoldedConvolution(layer, pairs[layer])
        if id(layer) in norms:
            return keras.layers.Identity(name=f"{layer.name}_folded")
        return layer

    def call(layer: keras.layers.Layer, *arguments: Any, **options: Any) -> Any:
        replaced = isinstance(layer, (FoldedConvolution, keras.layers.Identity))
        return layer(arguments[0]) if replaced else layer(*arguments, **options)  # less a mask

    return keras.models.clone_model(model, clone_function=replace, call_function=call)


def _foldable_pairs(
    model: keras.Model,
) -> dict[keras.layers.Layer, keras.layers.BatchNormalization]:
    """Finds each convolution whose output goes to a frozen BatchNorm and nowhere else."""
    own = {id(layer) for layer in model.layers}
    uses = collections.Counter(id(tensor) for tensor in model.outputs)
    for operation in model.operations:
        uses.update(id(tensor) for tensor in operation._inbound_nodes[0].input_tensors)
    pairs = {}
    for norm in model.layers:
        if not isinstance(norm, keras.layers.BatchNormalization) or norm.trainable:
            continue
        (tensor,) = norm._inbound_nodes[0].input_tensors
        convolution = tensor._keras_history.operation
        if (
            id(convolution) in own
            and uses[id(tensor)] == 1
            and _is_plain_convolution(convolution)
            and norm.axis in (-1, 3)
        ):
            pairs[convolution] = norm
    return pairs


def _is_plain_convolution(layer: keras.Operation) -> bool:
    kinds = (keras.layers.Conv2D, keras.layers.DepthwiseConv2D)
    return (
        type(layer) in kinds
        and layer.activation is keras.activations.linear
        and layer.data_format == "channels_last"
        and getattr(layer, "groups", 1) == 1
        and getattr(layer, "depth_multiplier", 1) == 1
        # Elsewhere the scaled kernel would be rounded; there XLA fuses the two layers anyway.
        and layer.compute_dtype == "float32"
    )
