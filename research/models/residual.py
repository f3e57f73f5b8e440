"""A small residual network, written out, to train from scratch.

He et al., "Deep Residual Learning for Image Recognition" (2015, arXiv:1512.03385), let a block of
layers learn only what to add to its input: y = x + F(x). The input reaches the output by the
identity shortcut, which costs no parameters and passes the gradient on undiminished, so that a
block that has nothing to add yet does no harm and many blocks can be stacked.

The order of layers here is that of "Identity Mappings in Deep Residual Networks" (2016,
arXiv:1603.05027), which the ResNet50V2 family follows too: normalisation and ReLU come before each
convolution, and nothing comes after the addition, so that the shortcut of a stage is the identity
from end to end.
"""

from __future__ import annotations

import keras
from keras import layers

from research.system.errors import UserError

STEM_FILTERS = 16
STAGE_FILTERS = (32, 64, 96)
BLOCKS_PER_STAGE = 2


def build_small_resnet(input_shape: tuple[int, int, int], weights: str | None) -> keras.Model:
    """Builds the network: a stem, then three stages of two blocks, each stage at half the size.

    Args:
      input_shape: (height, width, 3), each side at least 32.
      weights: None. The argument is there because the table of backbones gives it.

    Returns:
      A functional model from float images in [-1, 1], shape (batch, height, width, 3), to features
      (batch, ceil(height / 16), ceil(width / 16), 96). Its layers are named by stage and block.

    Raises:
      UserError: if `weights` is given; there are none to download.
    """
    if weights is not None:
        raise UserError(
            f"weights is {weights!r}; SmallResNet has no ImageNet weights: give --weights=none "
            "or a file"
        )
    images = layers.Input(input_shape, name="images")
    # Halving the size at once makes every later convolution four times cheaper.
    features = _convolution(images, STEM_FILTERS, 3, stride=2, name="stem_conv")
    for stage, filters in enumerate(STAGE_FILTERS, start=1):
        for block in range(1, BLOCKS_PER_STAGE + 1):
            stride = 2 if block == 1 else 1
            name = f"stage{stage}_block{block}"
            features = residual_block(features, filters, stride, name)
    # Nothing in a block normalises the sum it ends with, so the last sum needs this.
    features = _normalised_relu(features, "post")
    return keras.Model(images, features, name="small_resnet")


def residual_block(
    inputs: keras.KerasTensor, filters: int, stride: int, name: str
) -> keras.KerasTensor:
    """Adds a block of two 3x3 convolutions, and the shortcut around them.

    Where the block changes the size or the number of channels, its input cannot be added to its
    output as it is, and a 1x1 convolution stands in for the identity.

    Args:
      inputs: features (batch, height, width, channels).
      filters: channels of the output.
      stride: 1, or 2 to halve height and width.
      name: what the layers' names begin with.

    Returns:
      Features (batch, ceil(height / stride), ceil(width / stride), filters).
    """
    shortcut = inputs
    residual = _normalised_relu(inputs, f"{name}_1")
    if stride != 1 or inputs.shape[-1] != filters:
        shortcut = _convolution(residual, filters, 1, stride, f"{name}_shortcut_conv")
    residual = _convolution(residual, filters, 3, stride, f"{name}_1_conv")
    residual = _normalised_relu(residual, f"{name}_2")
    residual = _convolution(residual, filters, 3, 1, f"{name}_2_conv")
    return layers.Add(name=f"{name}_add")([shortcut, residual])


def _convolution(
    inputs: keras.KerasTensor, filters: int, size: int, stride: int, name: str
) -> keras.KerasTensor:
    # Without a bias: the normalisation that follows would subtract it again.
    return layers.Conv2D(
        filters,
        size,
        strides=stride,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
        name=name,
    )(inputs)


def _normalised_relu(inputs: keras.KerasTensor, name: str) -> keras.KerasTensor:
    normalised = layers.BatchNormalization(epsilon=1e-5, momentum=0.9, name=f"{name}_bn")(inputs)
    return layers.Activation("relu", name=f"{name}_relu")(normalised)
