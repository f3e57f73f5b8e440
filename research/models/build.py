"""What a backbone is: how it is built, what its input must look like, and its stages.

This module must stay free of TensorFlow and Keras until a backbone is built: the flags look names
up in the table, `backbones.py`.
"""

from __future__ import annotations

import contextlib
import difflib
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from research.system.errors import UserError, one_line

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

    Build = Callable[[tuple[int, int, int], str | None], keras.Model]
    Preprocessing = Callable[[tf.Tensor], tf.Tensor]

DOWNLOAD_SILENCE_SECONDS = 15.0


@dataclass(frozen=True)
class Stage:
    """A part of a backbone that can be unfrozen by name, and where it starts in `model.layers`.

    Layers that Keras named itself (`conv2d_17`) count what the process built before: no rule may
    rely on them.

    Attributes:
      name: what `--unfreeze_from` calls it.
      first_layer: index of its first layer, or how that layer's name begins.
      after: the whole name of the layer before its first one; replaces `first_layer`.
    """

    name: str
    first_layer: int | str = 0
    after: str | None = None


@dataclass(frozen=True)
class Backbone:
    """One entry of the table.

    Attributes:
      name: its key in the table.
      build: makes the model from (height, width, 3) and the weights, 'imagenet' or None; it has no
        top: its output has the shape (batch, height', width', channels).
      preprocessing: turns float32 RGB images in [0, 255], shape (batch, height, width, 3), into
        what the model was trained on, of the same shape.
      stages: from input to output, the first one starting at layer 0.
      minimum_size: the least image height and width in pixels.
    """

    name: str
    build: Build
    preprocessing: Preprocessing
    stages: tuple[Stage, ...]
    minimum_size: int = 32


def build_backbone(
    backbone: Backbone, image_size: int, weights: Literal["imagenet"] | None
) -> keras.Model:
    """Builds a backbone without top for square RGB images.

    Args:
      backbone: an entry of the table.
      image_size: height and width in pixels, at least `backbone.minimum_size`.
      weights: 'imagenet', which Keras downloads once to ~/.keras, or None for random ones.

    Returns:
      A functional model whose input is what `backbone.preprocessing` returns.

    Raises:
      UserError: if the image size is too small, or the weights cannot be downloaded.
    """
    if image_size < backbone.minimum_size:
        raise UserError(
            f"image_size is {image_size}; {backbone.name} takes at least {backbone.minimum_size}"
        )
    input_shape = (image_size, image_size, 3)
    if weights is None:
        return backbone.build(input_shape, None)
    try:
        with _socket_timeout(DOWNLOAD_SILENCE_SECONDS):
            return backbone.build(input_shape, weights)
    except Exception as error:
        if not _is_download_failure(error):
            raise
        reason = one_line(error)
        raise UserError(
            f"could not download the ImageNet weights of {backbone.name} ({reason}); give "
            "--weights=FILE, or --weights=none to train from scratch"
        ) from error


def stage_starts(model: keras.Model, backbone: Backbone) -> dict[str, int]:
    """Returns the index in `model.layers` of each stage's first layer, in order.

    `model.layers` is sorted by depth, so that `layers[:index]` is all that comes before the stage,
    and at these places one tensor alone leads from there into the stage.

    Raises:
      ValueError: if the model is not the one that the backbone's stages describe.
    """
    names = [layer.name for layer in model.layers]
    return {stage.name: _first_layer(names, stage, backbone.name) for stage in backbone.stages}


def first_trainable_layer(model: keras.Model, backbone: Backbone, unfreeze_from: str) -> int:
    """Resolves `--unfreeze_from` to an index in `model.layers`.

    Args:
      model: the backbone's model.
      backbone: the entry it was built from.
      unfreeze_from: an index from 0 to the number of layers, a stage, a layer's name, or 'none'.
        Where a stage and a layer share a name (InceptionV3's `mixed5` ends the stage), the stage
        is meant.

    Returns:
      The index of the first layer to train: 0 for all of them, `len(model.layers)` for none.

    Raises:
      UserError: if it is none of these.
    """
    count = len(model.layers)
    if unfreeze_from == "none":
        return count
    starts = stage_starts(model, backbone)
    if unfreeze_from in starts:
        return starts[unfreeze_from]
    names = [layer.name for layer in model.layers]
    if unfreeze_from in names:
        return names.index(unfreeze_from)
    try:
        index = int(unfreeze_from)
    except ValueError:
        nearest = nearest_names(unfreeze_from, [*starts, *names])
        found, hint = repr(unfreeze_from), f"; nearest: {nearest}" if nearest else ""
    else:
        if 0 <= index <= count:
            return index
        found, hint = str(index), ""
    raise UserError(
        f"unfreeze_from is {found}; {backbone.name} has {count} layers: expected 0 to {count}, a "
        f"layer name, one of the stages {', '.join(starts)}, or none{hint}"
    )


def _first_layer(names: list[str], stage: Stage, backbone: str) -> int:
    if stage.after is not None and stage.after in names:
        return names.index(stage.after) + 1
    for index, name in enumerate(names):
        if stage.after is None and (
            stage.first_layer == index
            or (isinstance(stage.first_layer, str) and name.startswith(stage.first_layer))
        ):
            return index
    raise ValueError(f"stage {stage.name} of {backbone} was not found: {stage} fits no layer")


def nearest_names(name: str, candidates: Iterable[str]) -> str:
    by_folded = {candidate.lower(): candidate for candidate in candidates}
    matches = difflib.get_close_matches(name.lower(), by_folded, n=3, cutoff=0.5)
    return ", ".join(by_folded[match] for match in matches)


def _is_download_failure(error: Exception) -> bool:
    # keras.utils.get_file wraps some failures in a bare Exception, and a wrong hash in ValueError.
    told = ("URL fetch failure", "Incomplete or corrupted file")
    return isinstance(error, OSError) or str(error).startswith(told)


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    # Keras downloads without a timeout: behind a firewall that drops packets it would hang.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
