"""Builds a backbone, and finds its stages and its first trainable layer.

This module must not import TensorFlow or Keras before a backbone is built: the flags read the
table of backbones in `backbone_table.py`.
"""

from __future__ import annotations

import difflib
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

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
    """One entry of the table of backbones, or a backbone in a user's own file.

    Attributes:
      name: key in the table; only for messages if the backbone is in a user's file.
      build: builds the model from the input shape (height, width, 3) and the weights, 'imagenet' or
        None. The model is functional and has no top: its output has the shape (batch, height',
        width', channels).
      preprocessing: converts float32 RGB images in [0, 255], shape (batch, height, width, 3), to
        the input of the model, of the same shape.
      stages: in order from input to output. The first stage starts at layer 0.
      minimum_size: smallest image height and width in pixels.
      patch: image heights and widths are multiples of this number of pixels.
      has_imagenet_weights: whether `build` takes the weights 'imagenet'.
    """

    name: str
    build: Build
    preprocessing: Preprocessing
    stages: tuple[Stage, ...]
    minimum_size: int = 32
    patch: int = 1
    has_imagenet_weights: bool = False

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


def check_fields(backbone: Backbone, value: str) -> None:
    """Raises `UserError` if a field has a wrong type.

    Args:
      backbone: an object of a user's file, in which types are not checked.
      value: the value of the setting `backbone`, for the message.
    """
    stages = backbone.stages
    is_right = {
        "name": isinstance(backbone.name, str),
        "build": callable(backbone.build),
        "preprocessing": callable(backbone.preprocessing),
        "stages": isinstance(stages, tuple) and all(isinstance(one, Stage) for one in stages),
        "minimum_size": isinstance(backbone.minimum_size, int),
        "patch": isinstance(backbone.patch, int) and backbone.patch > 0,
    }
    for field, right in is_right.items():
        if not right:
            raise UserError(
                f"backbone is {value!r}, whose {field} is {getattr(backbone, field)!r}; expected a "
                "name, the functions build and preprocessing, a tuple of Stage, and sizes in pixels"
            )


def build_backbone(
    backbone: Backbone, image_size: int, weights: Literal["imagenet"] | None
) -> keras.Model:
    """Builds a backbone without top for square RGB images.

    Args:
      backbone: an entry of the table, or a backbone in a user's file.
      image_size: height and width in pixels; see `Backbone.check_size`.
      weights: 'imagenet', which Keras downloads once to ~/.keras, or None for random weights.

    Returns:
      A functional model. Its input is the output of `backbone.preprocessing`.

    Raises:
      UserError: if the image size does not fit, if there are no ImageNet weights or they cannot be
        downloaded, or if the result is no such model.
    """
    backbone.check_size(image_size)
    if weights is not None and not backbone.has_imagenet_weights:
        raise UserError(
            f"weights is {weights!r}; {backbone.name} has no ImageNet weights: give "
            "--weights=FILE, or --weights=none to train from scratch"
        )
    input_shape = (image_size, image_size, 3)
    model = _build(backbone, input_shape, weights)
    _check_model(model, backbone, input_shape)
    return model


def _build(
    backbone: Backbone, input_shape: tuple[int, int, int], weights: str | None
) -> keras.Model:
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


def _check_model(model: keras.Model, backbone: Backbone, input_shape: tuple[int, int, int]) -> None:
    """Raises `UserError` unless a model is functional, has no top, and uses each layer once."""
    import keras

    if not isinstance(model, keras.Model) or not hasattr(model, "operations"):
        raise UserError(
            f"build of {backbone.name} returns a {type(model).__name__}; expected a functional "
            "model, keras.Model(inputs, outputs)"
        )
    shape = model.output_shape
    sizes = shape[1:] if isinstance(shape, tuple) and len(shape) == 4 else (None,)
    floats = model.inputs[0].dtype == "float32"
    if model.input_shape != (None, *input_shape) or None in sizes or not floats:
        raise UserError(
            f"build of {backbone.name} returns a model from {model.inputs[0].dtype} "
            f"{model.input_shape} to {shape}; expected from float32 {(None, *input_shape)} to "
            "(batch, height, width, channels), without top"
        )
    # The model is divided into frozen and trained layers. A layer at two places would be in both.
    nodes = [(operation.name, operation._inbound_nodes[0]) for operation in model.operations]
    made = {id(tensor) for _, node in nodes for tensor in node.output_tensors}
    used = [(name, tensor) for name, node in nodes for tensor in node.input_tensors]
    for name, tensor in [*used, *(("", tensor) for tensor in model.outputs)]:
        if id(tensor) not in made:
            maker = tensor._keras_history.operation
            raise UserError(
                f"build of {backbone.name} uses the layer "
                f"{maker.name if maker in model.operations else name!r} at several places; "
                "expected a new layer for each place"
            )


def check_preprocessing(backbone: Backbone, image_size: int) -> None:
    """Raises `UserError` if preprocessing changes the shape or the dtype of images.

    It is traced as in a data set, for float32 images (batch, image_size, image_size, 3).
    """
    import tensorflow as tf

    spec = tf.TensorSpec((None, image_size, image_size, 3), tf.float32)
    traced = tf.function(backbone.preprocessing, autograph=False).get_concrete_function(spec)
    found = traced.structured_outputs
    is_tensor = isinstance(found, tf.Tensor)
    if not is_tensor or found.shape != spec.shape or found.dtype != spec.dtype:
        shown = f"{found.dtype.name} of shape {found.shape}" if is_tensor else f"{type(found)}"
        raise UserError(
            f"preprocessing of {backbone.name} returns {shown} for float32 images of shape "
            f"{spec.shape}; expected float32 of the same shape"
        )


def stage_starts(model: keras.Model, backbone: Backbone) -> dict[str, int]:
    """Returns the index in `model.layers` of the first layer of each stage, in order.

    `model.layers` is sorted by depth, so `layers[:index]` contains every layer before the stage. At
    these indices, exactly one tensor connects the layers before the stage with the stage; in
    NASNet, whose cells also read the output of the cell before the last one, two or three do.

    Raises:
      UserError: if no layer of the model matches a stage, or if the stages are not in order.
    """

    def first_layer(stage: Stage) -> int:
        start = stage.first_layer
        for index, layer in enumerate(model.layers):
            if layer.name.startswith(start) if isinstance(start, str) else index == start:
                return index
        raise UserError(
            f"stage {stage.name} of {backbone.name} was not found: no layer matches {start!r}; "
            f"expected 0 to {len(model.layers) - 1}, or how the name of a layer begins"
        )

    starts = {stage.name: first_layer(stage) for stage in backbone.stages}
    indices = list(starts.values())
    if indices[:1] != [0] or indices != sorted({*indices}) or len(starts) < len(backbone.stages):
        raise UserError(
            f"the stages of {backbone.name} start at the layers "
            f"{', '.join(f'{index} ({name})' for name, index in starts.items()) or 'of no stage'}; "
            "expected different names, and layer 0 for the first and a later layer for each next"
        )
    return starts


class FirstLayers(NamedTuple):
    """Two values of `--unfreeze_from` for a backbone.

    Attributes:
      usual: layer 100, or `half` if the backbone has no more than 100 layers.
      half: the last stage with at most 55 % of the operations of a forward pass before it.
    """

    usual: str
    half: str


def suggest_first_layers(model: keras.Model, backbone: Backbone) -> FirstLayers:
    """Returns the layers from which on a backbone is trained without further knowledge."""
    from research.models.cost import forward_cost

    most = 0.55 * forward_cost(model.layers)
    starts = stage_starts(model, backbone).items()
    half = [name for name, start in starts if forward_cost(model.layers[:start]) <= most][-1]
    return FirstLayers("100" if len(model.layers) > 100 else half, half)


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
