"""Builds a backbone, and finds its stages and its first trainable layer.

This module must not import TensorFlow or Keras before a backbone is built: the flags read the
table of backbones in `backbone_table.py`.
"""

from __future__ import annotations

import difflib
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from research.system.errors import UserError, one_line

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

    Build = Callable[[tuple[int, int, int], str | None], keras.Model]
    Preprocessing = Callable[[tf.Tensor], tf.Tensor]

DOWNLOAD_TIMEOUT_SECONDS = 15.0
# The layer after the last feature map, in networks whose last layers follow the pooling.
POOLING = "backbone_pooling"


@dataclass(frozen=True)
class Stage:
    """A part of a backbone that `--unfreeze_from` can name, and its first layer.

    Attributes:
      name: the name of the stage for `--unfreeze_from`.
      first_layer: index of the first layer in `model.layers`, or a prefix of that layer's name.
        Do not use a name that Keras generates (`conv2d_17`): its number counts all layers that
        the process has built.
    """

    name: str
    first_layer: int | str = 0


@dataclass(frozen=True)
class Backbone:
    """One entry of the table of backbones.

    Attributes:
      name: key in the table.
      build: builds the model from the input shape (height, width, 3) and the weights, 'imagenet' or
        None. The model has no top: its output has the shape (batch, height', width', channels).
      preprocessing: converts float32 RGB images in [0, 255], shape (batch, height, width, 3), to
        the input of the model, of the same shape.
      stages: in order from input to output. The first stage starts at layer 0.
      minimum_size: smallest image height and width in pixels.
      patch: image heights and widths are multiples of this number of pixels.
    """

    name: str
    build: Build
    preprocessing: Preprocessing
    stages: tuple[Stage, ...]
    minimum_size: int = 32
    patch: int = 1

    def check_size(self, image_size: int) -> None:
        """Raises `UserError` if photos of this height and width do not fit the backbone."""
        if image_size < self.minimum_size:
            raise UserError(
                f"image_size is {image_size}; expected at least {self.minimum_size} for {self.name}"
            )
        if image_size % self.patch:
            lower = image_size - image_size % self.patch
            raise UserError(
                f"image_size is {image_size}; {self.name} has patches of {self.patch} pixels: "
                f"expected a multiple, such as {lower} or {lower + self.patch}"
            )

    def nearest_size(self, image_size: float) -> int:
        """Returns the nearest size for evaluation: a multiple of 32 pixels, or of the patch."""
        step = self.patch if 32 % self.patch else 32
        return step * max(1, round(image_size / step))


def build_backbone(
    backbone: Backbone, image_size: int, weights: Literal["imagenet"] | None
) -> keras.Model:
    """Builds a backbone without top for square RGB images.

    Args:
      backbone: an entry of the table.
      image_size: height and width in pixels; see `Backbone.check_size`.
      weights: 'imagenet', which Keras downloads once to ~/.keras, or None for random weights.

    Returns:
      A functional model. Its input is the output of `backbone.preprocessing`.

    Raises:
      UserError: if the image size does not fit, or if the weights cannot be downloaded.
    """
    backbone.check_size(image_size)
    input_shape = (image_size, image_size, 3)
    if weights is None:
        return backbone.build(input_shape, None)
    # Keras downloads without a timeout and would hang behind a firewall that drops packets.
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)
    try:
        return backbone.build(input_shape, weights)
    except Exception as error:
        # keras.utils.get_file raises a bare Exception for some failures of a download, and
        # ValueError for a wrong hash.
        failures = ("URL fetch failure", "Incomplete or corrupted file")
        if not isinstance(error, OSError) and not str(error).startswith(failures):
            raise
        raise UserError(
            f"could not download the ImageNet weights of {backbone.name} ({one_line(error)}); give "
            "--weights=FILE, or --weights=none to train from scratch"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def refuse_keras_weights(weights: str | None, name: str) -> None:
    """Raises `UserError` for weights of Keras, for a network whose weights only timm has."""
    if weights is not None:
        raise UserError(
            f"weights is {weights!r}, but Keras has none for {name}; give "
            "--weights=FILE.safetensors, or --weights=none to train from scratch"
        )


def stage_starts(model: keras.Model, backbone: Backbone) -> dict[str, int]:
    """Returns the index in `model.layers` of the first layer of each stage, in order.

    `model.layers` is sorted by depth, so `layers[:index]` contains every layer before the stage. At
    these indices, exactly one tensor connects the layers before the stage with the stage; in
    NASNet, whose cells also read the output of the cell before the last one, two or three do.

    Raises:
      ValueError: if no layer of the model matches a stage.
    """

    def first_layer(stage: Stage) -> int:
        start = stage.first_layer
        for index, layer in enumerate(model.layers):
            if layer.name.startswith(start) if isinstance(start, str) else index == start:
                return index
        raise ValueError(
            f"stage {stage.name} of {backbone.name} was not found: no layer matches {start!r}"
        )

    return {stage.name: first_layer(stage) for stage in backbone.stages}


def first_trainable_layer(model: keras.Model, backbone: Backbone, unfreeze_from: str) -> int:
    """Converts `--unfreeze_from` to an index in `model.layers`.

    Args:
      model: the model of the backbone.
      backbone: the entry of the table that built the model.
      unfreeze_from: an index from 0 to the number of layers, a stage, the name of a layer, or
        'none'. If a stage and a layer have the same name, the stage is used. For example,
        InceptionV3's layer `mixed5` is the last layer of the stage `mixed5`.

    Returns:
      The index of the first layer to train: 0 to train all layers, `len(model.layers)` to train
      none.

    Raises:
      UserError: if `unfreeze_from` is none of these.
    """
    count = len(model.layers)
    starts = stage_starts(model, backbone)
    layers = {layer.name: index for index, layer in enumerate(model.layers)}
    indices = {str(index): index for index in range(count + 1)}
    places = {**indices, **layers, **starts, "none": count}
    if unfreeze_from in places:
        return places[unfreeze_from]
    nearest = nearest_names(unfreeze_from, [*starts, *layers])
    hint = f"; nearest: {nearest}" if nearest else ""
    raise UserError(
        f"unfreeze_from is {unfreeze_from!r}; {backbone.name} has {count} layers: expected 0 to "
        f"{count}, a layer name, one of the stages {', '.join(starts)}, or none{hint}"
    )


def nearest_names(name: str, candidates: Iterable[str]) -> str:
    """Returns up to three candidates that resemble a name, joined by commas; case is ignored."""
    by_lower_case = {candidate.lower(): candidate for candidate in candidates}
    matches = difflib.get_close_matches(name.lower(), by_lower_case, n=3, cutoff=0.5)
    return ", ".join(by_lower_case[match] for match in matches)
