"""Replaces layers by faster ones: frozen BatchNorm, padding, and convolutions with other gradients.

All layers keep their variables, and the results are the same up to rounding.
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf

from research.models.batch_norm import scale_and_offset
from research.system import devices


class _FastLayer(keras.layers.Layer):
    """A layer that computes what another one does, with its variables and its dtypes.

    Args:
      original: the other layer.
      suffix: ends the layer's name.
    """

    def __init__(self, original: keras.layers.Layer, suffix: str) -> None:
        # Without autocast, variables keep float32, and a scaled kernel is rounded only once.
        name, policy = f"{original.name}_{suffix}", original.dtype_policy
        super().__init__(name=name, dtype=policy, autocast=False)
        self.original = original
        self.built = True

    def compute_output_spec(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        """Returns shape and dtype of the outputs, without tracing `call`."""
        shape = self.original.compute_output_shape(inputs.shape)
        return keras.KerasTensor(shape, self.compute_dtype)


class FoldedConvolution(_FastLayer):
    """A convolution with the layers around it: zeros at the edges before it, BatchNorm after it.

    With frozen statistics, BatchNorm is a scale and an offset per channel. Scaling the kernel is
    much cheaper than scaling the activations, and oneDNN can then fuse the convolution with the
    ReLU after it. The zeros need no copy of the activations. The layer shares the variables of the
    other layers, and the kernel stays trainable.

    Args:
      convolution: a `Conv2D` or `DepthwiseConv2D`.
      padding: the layer before the convolution, which adds as many zeros as `padding="same"` of the
        convolution would. None if there is none.
      norm: the frozen `BatchNormalization` after the convolution, which then has no activation.
        None if there is none.
    """

    def __init__(
        self,
        convolution: keras.layers.Layer,
        padding: keras.layers.ZeroPadding2D | None,
        norm: keras.layers.BatchNormalization | None,
    ) -> None:
        super().__init__(convolution, "folded")
        self.padding = padding
        self.norm = norm

    def compute_output_spec(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        """Returns shape and dtype of the outputs, without tracing `call`."""
        if self.padding:
            shape = self.padding.compute_output_shape(inputs.shape)
            inputs = keras.KerasTensor(shape, inputs.dtype)
        return super().compute_output_spec(inputs)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Maps (batch, height, width, channels) to the output of all layers, up to rounding."""
        layer, norm = self.original, self.norm
        kernel, offset = layer.kernel, layer.bias if layer.use_bias else None
        is_depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
        if norm:
            scale, shift = scale_and_offset(norm, norm.moving_mean, norm.moving_variance)
            offset = shift if offset is None else shift + offset * scale
            # A depthwise kernel has the shape (height, width, channels, 1).
            kernel = kernel * (scale[:, tf.newaxis] if is_depthwise else scale)
        padding = "same" if self.padding else layer.padding
        strides, dilation = layer.strides, layer.dilation_rate
        dtype = self.compute_dtype
        is_common = strides == (1, 1) and layer.kernel_size == (3, 3)
        if is_depthwise and not is_common and layer.trainable and dtype == "bfloat16":
            # oneDNN computes the gradients of these layers two to four times as fast in float32.
            dtype = "float32"
        inputs, kernel = tf.cast(inputs, dtype), tf.cast(kernel, dtype)
        if is_depthwise:
            outputs = keras.ops.depthwise_conv(inputs, kernel, strides, padding, None, dilation)
        elif layer.kernel_size == strides == (1, 1):
            outputs = pointwise_convolution(inputs, kernel)
        else:
            outputs = keras.ops.conv(inputs, kernel, strides, padding, None, dilation)
        outputs = tf.cast(outputs, self.compute_dtype)
        if offset is not None:
            offset = tf.cast(offset, self.compute_dtype)
            add = add_bias if layer.use_bias else tf.nn.bias_add
            outputs = add(outputs, offset)
        return layer.activation(outputs)


def add_bias(outputs: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
    """Adds a bias, (channels,), whose gradient is summed in float32.

    The gradient of `bias_add` is summed in the dtype of the outputs: in bfloat16, with an error of
    several percent.
    """
    return tf.nn.bias_add(outputs, bias) if outputs.dtype == tf.float32 else outputs + bias


class FrozenBatchNorm(_FastLayer):
    """A frozen BatchNorm that cannot be folded, for example before a convolution.

    Keras computes it in four operations, in float32, and casts its gradient twice. This layer takes
    one operation in each direction, which computes in float32 and rounds once. The variables are
    shared.

    Args:
      norm: normalizes (batch, height, width, channels) over the channels.
    """

    def __init__(self, norm: keras.layers.BatchNormalization) -> None:
        super().__init__(norm, "frozen")

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Maps (batch, height, width, channels) to the output of BatchNorm, up to rounding."""
        norm = self.original
        scale, offset = scale_and_offset(norm, norm.moving_mean, norm.moving_variance)
        return _scale_channels(tf.cast(inputs, self.compute_dtype), scale, offset)


@tf.custom_gradient
def _scale_channels(
    inputs: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor
) -> tuple[tf.Tensor, Callable[[tf.Tensor], tuple[tf.Tensor, None, None]]]:
    """Multiplies channels by a constant float32 scale and adds an offset, both (channels,)."""
    zeros = tf.zeros_like(scale)

    def compute(values: tf.Tensor, offset: tf.Tensor) -> tf.Tensor:
        return tf.raw_ops.FusedBatchNormV3(
            x=values,
            scale=scale,
            offset=offset,
            mean=zeros,
            variance=zeros + 1.0,
            epsilon=0.0,
            is_training=False,
        ).y

    def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, None, None]:
        return compute(upstream, zeros), None, None

    return compute(inputs, offset), gradient


class PointwiseConvolution(_FastLayer):
    """A trained convolution with a kernel of one pixel; see `pointwise_convolution`.

    Args:
      convolution: a `Conv2D` with such a kernel and without strides. Its variables are shared.
    """

    def __init__(self, convolution: keras.layers.Conv2D) -> None:
        super().__init__(convolution, "pointwise")

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Maps (batch, height, width, channels) to what the convolution computes."""
        layer, dtype = self.original, self.compute_dtype
        outputs = pointwise_convolution(tf.cast(inputs, dtype), tf.cast(layer.kernel, dtype))
        if layer.use_bias:
            outputs = add_bias(outputs, tf.cast(layer.bias, dtype))
        return layer.activation(outputs)


@tf.custom_gradient
def pointwise_convolution(
    inputs: tf.Tensor, kernel: tf.Tensor
) -> tuple[tf.Tensor, Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]]:
    """Convolves with a kernel of one pixel; its gradients are matrix products.

    On CPUs, they are up to four times as fast as the convolutions that TensorFlow uses for them. On
    GPUs, the convolution itself is a matrix product too, which XLA launches in one graph with the
    operations around it, and which a convolution of cuDNN would interrupt.

    Args:
      inputs: (batch, height, width, channels).
      kernel: (1, 1, channels, filters).

    Returns:
      (batch, height, width, filters).
    """

    def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        rows = tf.reshape(upstream, (-1, kernel.shape[3]))
        columns = tf.reshape(inputs, (-1, kernel.shape[2]))
        of_inputs = tf.reshape(tf.matmul(rows, kernel[0, 0], transpose_b=True), tf.shape(inputs))
        return of_inputs, tf.reshape(tf.matmul(columns, rows, transpose_a=True), kernel.shape)

    return _convolve(inputs, kernel), gradient


def _convolve(inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    if not devices.has_gpu():
        return tf.nn.conv2d(inputs, kernel, 1, "VALID")
    return tf.tensordot(inputs, kernel[0, 0], 1)


def with_fast_layers(model: keras.Model) -> keras.Model:
    """Returns a model with the same outputs that is faster to compute and to train.

    It shares all layers and variables with the original. A BatchNorm is not folded if it is
    trainable, or if it does not directly follow a convolution whose output only it uses. On CPUs, a
    frozen BatchNorm that is not folded becomes a `FrozenBatchNorm`. `ZeroPadding2D` is folded if
    only a convolution uses its output, and `padding="same"` would add the same zeros.
    """
    neighbours = _neighbours(model)
    norm_of, padding_of = _foldable_norms(neighbours), _foldable_paddings(neighbours)
    folded = {*norm_of.values(), *padding_of.values()}
    frozen = {layer for layer in model.layers if _is_frozen_norm(layer)} - folded
    pointwise = {layer for layer in model.layers if _is_pointwise(layer)}
    if not folded and not pointwise and not frozen:
        return model

    def replace(layer: keras.layers.Layer) -> keras.layers.Layer:
        if layer in norm_of or layer in padding_of:
            return FoldedConvolution(layer, padding_of.get(layer), norm_of.get(layer))
        if layer in folded:
            return keras.layers.Identity(name=f"{layer.name}_folded")
        if layer in frozen:
            return FrozenBatchNorm(layer)
        return PointwiseConvolution(layer) if layer in pointwise else layer

    def call(layer: keras.layers.Layer, *arguments: Any, **options: Any) -> Any:
        # BatchNorm takes a mask; the layers that replace it do not.
        replaced = isinstance(layer, (FoldedConvolution, FrozenBatchNorm, keras.layers.Identity))
        return layer(arguments[0]) if replaced else layer(*arguments, **options)

    return keras.models.clone_model(model, clone_function=replace, call_function=call)


def _is_frozen_norm(layer: keras.layers.Layer) -> bool:
    """Returns whether `FrozenBatchNorm` can replace a layer and make it faster."""
    return (
        type(layer) is keras.layers.BatchNormalization
        and not layer.trainable
        and len(layer.input.shape) == 4
        and layer.axis in (-1, 3)
        and layer.compute_dtype in ("float32", "bfloat16")
        and layer.variable_dtype == "float32"
        and not devices.has_gpu()  # not measured there
    )


def _is_pointwise(layer: keras.layers.Layer) -> bool:
    """Returns whether `PointwiseConvolution` can replace a layer and make it faster."""
    return (
        type(layer) is keras.layers.Conv2D
        and layer.trainable
        and layer.kernel_size == layer.strides == (1, 1)
        and layer.groups == 1
        and layer.data_format == "channels_last"
    )


def _neighbours(model: keras.Model) -> list[tuple[keras.Layer, keras.Layer]]:
    """Returns each two layers of which only the second uses the output of the first.

    Layers that the model calls twice are left out, because folding would change both calls.
    """
    nodes = list(itertools.chain.from_iterable(model._nodes_by_depth.values()))
    calls = collections.Counter(node.operation for node in nodes)
    uses = collections.Counter(id(tensor) for tensor in model.outputs)
    uses.update(id(tensor) for node in nodes for tensor in node.input_tensors)
    pairs = []
    for node in nodes:
        for tensor in node.input_tensors:
            pair = tensor._keras_history.operation, node.operation
            if uses[id(tensor)] == 1 and all(calls[one] == 1 for one in pair):
                pairs.append(pair)
    return pairs


def _is_plain_convolution(layer: keras.layers.Layer) -> bool:
    return (
        type(layer) in (keras.layers.Conv2D, keras.layers.DepthwiseConv2D)
        and layer.data_format == "channels_last"
        and getattr(layer, "groups", 1) == 1
        and getattr(layer, "depth_multiplier", 1) == 1
        # float16 could not represent each scaled kernel.
        and layer.compute_dtype in ("float32", "bfloat16")
    )


def _foldable_norms(
    neighbours: Iterable[tuple[keras.Layer, keras.Layer]],
) -> dict[keras.Layer, keras.layers.BatchNormalization]:
    """Maps each plain convolution to the frozen BatchNorm after it."""
    return {
        layer: norm
        for layer, norm in neighbours
        if isinstance(norm, keras.layers.BatchNormalization)
        and not norm.trainable
        and norm.axis in (-1, 3)
        and _is_plain_convolution(layer)
        and layer.activation is keras.activations.linear
    }


def _foldable_paddings(
    neighbours: Iterable[tuple[keras.Layer, keras.Layer]],
) -> dict[keras.Layer, keras.layers.ZeroPadding2D]:
    """Maps each plain convolution to the zeros before it, if `padding="same"` would add them."""
    return {
        layer: padding
        for padding, layer in neighbours
        if type(padding) is keras.layers.ZeroPadding2D
        and padding.data_format == "channels_last"
        and _is_plain_convolution(layer)
        and layer.padding == "valid"
        and layer.dilation_rate == (1, 1)
        and padding.padding == _same_padding(padding.input.shape[1:3], layer)
    }


def _same_padding(sides: Sequence[int | None], layer: keras.layers.Layer) -> tuple | None:
    """Returns the zeros that `padding="same"` adds: ((top, bottom), (left, right)).

    Args:
      sides: height and width of the input. The result is None if they are not known.
      layer: the convolution.
    """
    if None in sides:
        return None
    zeros = []
    for side, kernel, stride in zip(sides, layer.kernel_size, layer.strides, strict=True):
        total = max(0, (math.ceil(side / stride) - 1) * stride + kernel - side)
        zeros.append((total // 2, total - total // 2))
    return tuple(zeros)
