"""ConvNeXt V2, as a flat functional model of Keras layers.

A block is a depthwise convolution of 7 x 7 pixels and two dense layers. Between the dense layers,
Global Response Normalization compares the channels of a photo: the norm of each channel over all
places, divided by the mean of these norms, scales the channel (Woo et al. 2023, arXiv:2301.00808).

Only layers and operations of Keras are used, so that a `.keras` file needs no code of this project.
Layer names begin with the stage, and then follow timm: `stage0_block0_conv_dw`, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence

import keras
from keras import layers, ops

from research.models.backbone import POOLING
from research.models.vision_transformer import gelu

EPSILON = 1e-6


def build_convnext_v2(
    input_shape: tuple[int, int, int],
    weights: str | None,
    name: str,
    depths: Sequence[int],
    widths: Sequence[int],
) -> keras.Model:
    """Builds ConvNeXt V2 without its classifier.

    Args:
      input_shape: (height, width, 3), with height and width of at least 32.
      weights: None. The table of backbones calls every builder with this argument.
      name: the name of the entry.
      depths: number of blocks of each stage.
      widths: channels of each stage.

    Returns:
      A functional model that maps float images (batch, height, width, 3) to features (batch, 1, 1,
      widths[-1]): the normalized mean over all places, which timm's classifier gets too.
    """
    images = layers.Input(input_shape, name="images")
    features = _convolution(widths[0], 4, "stem_patches")(images)
    features = _norm("stem_norm")(features)
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        if stage:
            features = _norm(f"stage{stage}_downsample_norm")(features)
            features = _convolution(width, 2, f"stage{stage}_downsample_conv")(features)
        for block in range(depth):
            prefix = f"stage{stage}_block{block}"
            branch = _branch(features, width, prefix)
            features = layers.Add(name=f"{prefix}_add")([features, branch])
    # A sum over many places is not precise in float16.
    pooling = layers.GlobalAveragePooling2D(keepdims=True, dtype="float32", name=POOLING)
    features = _norm("head_norm")(pooling(features))
    return keras.Model(images, features, name=name.lower())


def _branch(features: keras.KerasTensor, width: int, prefix: str) -> keras.KerasTensor:
    initial = _initial()
    branch = layers.DepthwiseConv2D(
        7, padding="same", depthwise_initializer=initial, name=f"{prefix}_conv_dw"
    )(features)
    branch = _norm(f"{prefix}_norm")(branch)
    branch = layers.Dense(4 * width, kernel_initializer=initial, name=f"{prefix}_fc1")(branch)
    branch = gelu(branch)
    # Squares of float16 values overflow. The root of 0 has no gradient.
    squares = ops.sum(ops.square(ops.cast(branch, "float32")), axis=(1, 2), keepdims=True)
    norms = ops.sqrt(ops.maximum(squares, 1e-12))
    response = norms / (ops.mean(norms, axis=-1, keepdims=True) + EPSILON)
    # A depthwise convolution over one place multiplies each channel by a learned number, and adds
    # another one. The second place, which has 0, gives the added number alone.
    places = ops.concatenate([response, ops.zeros_like(response)], axis=1)
    learned = layers.DepthwiseConv2D(
        1, depthwise_initializer="zeros", dtype="float32", name=f"{prefix}_grn"
    )(places)
    scale, offset = 1.0 + learned[:, :1] - learned[:, 1:], learned[:, 1:]
    branch = branch * ops.cast(scale, branch.dtype) + ops.cast(offset, branch.dtype)
    return layers.Dense(width, kernel_initializer=initial, name=f"{prefix}_fc2")(branch)


def _norm(name: str) -> keras.layers.Layer:
    return layers.LayerNormalization(epsilon=EPSILON, name=name)


def _convolution(width: int, patch: int, name: str) -> keras.layers.Layer:
    return layers.Conv2D(width, patch, patch, kernel_initializer=_initial(), name=name)


def _initial() -> keras.initializers.Initializer:
    return keras.initializers.TruncatedNormal(0.0, 0.02)
