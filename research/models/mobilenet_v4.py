"""MobileNetV4 without attention, as a flat functional model of Keras layers.

Its universal inverted bottleneck has up to two depthwise convolutions: before the expansion, and
between expansion and projection (Qin et al. 2024, arXiv:2404.10518).

Only layers and operations of Keras are used, so that a `.keras` file needs no code of this project.
Layer names begin with the stage, and then follow timm: `stage2_block0_dw_mid_conv`, and so on.
"""

from __future__ import annotations

import re

import keras
from keras import layers

from research.models.backbone import POOLING

FEATURES = 1280


def build_mobilenet_v4(
    input_shape: tuple[int, int, int], weights: str | None, name: str, stem: int, *stages: str
) -> keras.Model:
    """Builds MobileNetV4 without its classifier.

    Args:
      input_shape: (height, width, 3), with height and width of at least 32.
      weights: None. The table of backbones calls every builder with this argument.
      name: the name of the entry.
      stem: channels of the first convolution.
      *stages: the blocks of each stage, as in the table of backbones. The first block of each stage
        but the last one halves height and width.

    Returns:
      A functional model that maps float images (batch, height, width, 3) to features (batch, 1, 1,
      1280). As in timm, the last convolution follows the mean over all places.
    """
    images = layers.Input(input_shape, name="images")
    features = _convolution(images, "conv_stem bn_stem relu", stem, 3, 2)
    for stage, blocks in enumerate(stages):
        for block, text in enumerate(blocks.split()):
            stride = 2 if block == 0 and stage < len(stages) - 1 else 1
            features = _block(features, text, stride, f"stage{stage}_block{block}_")
    # A sum over many places is not precise in float16.
    pooling = layers.GlobalAveragePooling2D(keepdims=True, dtype="float32", name=POOLING)
    features = _convolution(pooling(features), "conv_head norm_head relu", FEATURES, 1, 1)
    return keras.Model(images, features, name=name.lower())


def _block(inputs: keras.KerasTensor, text: str, stride: int, prefix: str) -> keras.KerasTensor:
    match = re.fullmatch(r"([ceu])(\d)(\d?)x?(\d?):(\d+)", text)
    assert match is not None
    first, second, expansion, width = (int(number or 0) for number in match.groups()[1:])
    wide = expansion * inputs.shape[-1]
    # Names, channels (0: depthwise), size (0: no convolution), stride.
    convolutions = {
        "c": [("conv bn1 relu", width, first, stride)],
        "e": [("conv_exp bn1 relu", wide, first, stride), ("conv_pwl bn2", width, 1, 1)],
        "u": [
            ("dw_start_conv dw_start_bn", 0, first, 1 if second else stride),
            ("pw_exp_conv pw_exp_bn relu", wide, 1, 1),
            ("dw_mid_conv dw_mid_bn relu", 0, second, stride),
            ("pw_proj_conv pw_proj_bn", width, 1, 1),
        ],
    }
    features = inputs
    for names, channels, size, step in convolutions[match[1]]:
        if size:
            features = _convolution(features, names, channels, size, step, prefix)
    if match[1] == "u" and stride == 1 and features.shape == inputs.shape:
        features = layers.Add(name=f"{prefix}add")([inputs, features])
    return features


def _convolution(
    inputs: keras.KerasTensor, names: str, channels: int, size: int, stride: int, prefix: str = ""
) -> keras.KerasTensor:
    """Adds a convolution and BatchNorm, and ReLU if it is one of the names."""
    convolution, norm, *activation = (f"{prefix}{name}" for name in names.split())
    if stride > 1:
        # PyTorch pads both sides. For even sizes, padding="same" only pads the end.
        inputs = layers.ZeroPadding2D(size // 2, name=f"{convolution}_pad")(inputs)
    padding = "valid" if stride > 1 else "same"
    layer = (
        layers.Conv2D(channels, size, stride, padding, use_bias=False, name=convolution)
        if channels
        else layers.DepthwiseConv2D(size, stride, padding, use_bias=False, name=convolution)
    )
    outputs = layers.BatchNormalization(epsilon=1e-5, momentum=0.9, name=norm)(layer(inputs))
    return layers.ReLU(name=f"{norm}_relu")(outputs) if activation else outputs
