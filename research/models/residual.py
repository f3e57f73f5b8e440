"""A small residual network without pretrained weights, for training from scratch.

A residual block computes y = x + F(x): its layers learn only the difference F(x) from its input
(He et al., "Deep Residual Learning for Image Recognition", 2015, arXiv:1512.03385). The identity
shortcut has no parameters and passes the gradient on unchanged, so many blocks can be stacked.

The layers are in the order of "Identity Mappings in Deep Residual Networks" (2016,
arXiv:1603.05027), which the ResNet50V2 family uses too: normalization and ReLU come before each
convolution, and no layer follows the addition.
"""

from __future__ import annotations

import keras
from keras import layers

STEM_FILTERS = 16
STAGE_FILTERS = (32, 64, 96)
BLOCKS_PER_STAGE = 2


def build_small_resnet(input_shape: tuple[int, int, int], weights: str | None) -> keras.Model:
    """Builds a stem and three stages of two blocks. The stem and each stage halve height and width.

    Args:
      input_shape: (height, width, 3), with height and width of at least 32.
      weights: None, because there are no weights to download. The table of backbones calls every
        builder with this argument.

    Returns:
      A functional model that maps float images in [-1, 1], shape (batch, height, width, 3), to
      features (batch, ceil(height / 16), ceil(width / 16), 96). The name of each layer contains its
      stage and block.
    """
    images = layers.Input(input_shape, name="images")
    # The stride of 2 makes every later convolution four times cheaper.
    features = _convolution(images, STEM_FILTERS, 3, stride=2, name="stem_conv")
    for stage, filters in enumerate(STAGE_FILTERS, start=1):
        for block in range(1, BLOCKS_PER_STAGE + 1):
            stride = 2 if block == 1 else 1
            features = residual_block(features, filters, stride, f"stage{stage}_block{block}")
    # The output of the last block is a sum that is not normalized yet.
    features = _normalized_relu(features, "post")
    return keras.Model(images, features, name="small_resnet")


def residual_block(
    inputs: keras.KerasTensor, filters: int, stride: int, name: str
) -> keras.KerasTensor:
    """Adds two 3x3 convolutions and a shortcut.

    The shortcut is the identity. If the block changes the size or the number of channels, the
    shortcut is a 1x1 convolution.

    Args:
      inputs: features (batch, height, width, channels).
      filters: channels of the output.
      stride: 1, or 2 to halve height and width.
      name: prefix of the layers' names.

    Returns:
      Features (batch, ceil(height / stride), ceil(width / stride), filters).
    """
    shortcut = inputs
    residual = _normalized_relu(inputs, f"{name}_1")
    if stride != 1 or inputs.shape[-1] != filters:
        shortcut = _convolution(residual, filters, 1, stride, f"{name}_shortcut_conv")
    residual = _convolution(residual, filters, 3, stride, f"{name}_1_conv")
    residual = _normalized_relu(residual, f"{name}_2")
    residual = _convolution(residual, filters, 3, 1, f"{name}_2_conv")
    return layers.Add(name=f"{name}_add")([shortcut, residual])


def _convolution(
    inputs: keras.KerasTensor, filters: int, size: int, stride: int, name: str
) -> keras.KerasTensor:
    # The normalization after the convolution would remove a bias.
    return layers.Conv2D(
        filters, size, stride, "same", use_bias=False, kernel_initializer="he_normal", name=name
    )(inputs)


def _normalized_relu(inputs: keras.KerasTensor, name: str) -> keras.KerasTensor:
    normalized = layers.BatchNormalization(epsilon=1e-5, momentum=0.9, name=f"{name}_bn")(inputs)
    return layers.Activation("relu", name=f"{name}_relu")(normalized)
