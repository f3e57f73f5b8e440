"""Grad-CAM heat maps (Selvaraju et al. 2017, arXiv 1610.02391)."""

from __future__ import annotations

from collections.abc import Callable

import keras
import tensorflow as tf

from research.loop.steps import Network
from research.models.backbone import POOLING
from research.models.split import crossing_tensors
from research.models.vision_transformer import last_normalization, to_map
from research.models.wrapper import Wrapper


def grad_cam(network: Network, images: tf.Tensor, classes: tf.Tensor) -> tf.Tensor:
    """Returns a heat map of the evidence for a class, for each image.

    The map is the sum of the channels of the backbone's last feature map, weighted by the mean
    gradient of the class's logit. It has the resolution of that feature map: about one value per 32
    pixels of the image. If the backbone itself pools, this is the map before its pooling. A vision
    transformer has none. Its map is made from the normalized patch tokens before the attention of
    the last block: one value per patch.

    Args:
      network: the network to explain.
      images: preprocessed for the backbone, (batch, height, width, 3).
      classes: int (batch,), one class per image. With two classes, the logit of the first class is
        minus the logit of the second.

    Returns:
      float32 (batch, height', width') in [0, 1]. The maximum of each map is 1, or 0 if no place is
      evidence for the class.
    """
    batch = {"image": images, "weight": tf.ones(tf.shape(images)[0])}
    parts, model = network.parts, network.model
    if (layer := _inner_map(model.backbone)) is None:
        features = parts.features(network.activations(batch), batch["weight"], training=False)
        features = tf.cast(features, tf.float32)
        gradients = _gradients(model, lambda places: places, features, classes)
    else:
        features, gradients = _of_layer(model, layer, images, classes)
    weights = tf.reduce_mean(gradients, axis=(1, 2), keepdims=True)
    maps = tf.nn.relu(tf.reduce_sum(weights * features, axis=-1))
    return tf.math.divide_no_nan(maps, tf.reduce_max(maps, axis=(1, 2), keepdims=True))


def _gradients(
    model: Wrapper,
    rest: Callable[[tf.Tensor], tf.Tensor],
    values: tf.Tensor,
    classes: tf.Tensor,
) -> tf.Tensor:
    """Returns the gradients of the logits of classes with respect to the input of `rest`."""
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(values)
        logits = model.head(model.pooling(rest(values)), training=False)
        if logits.shape[-1] == 1:
            logits = tf.concat([-logits, logits], axis=-1)
        of_class = tf.gather(logits, classes, batch_dims=1)
    return tape.gradient(of_class, values)


def _inner_map(backbone: keras.Model) -> keras.Layer | None:
    """Returns the layer whose output is the last map, or None if it is that of the backbone."""
    names = [layer.name for layer in backbone.layers]
    if POOLING in names:
        return backbone.layers[names.index(POOLING) - 1]
    return last_normalization(backbone)


def _of_layer(
    model: Wrapper, layer: keras.Layer, images: tf.Tensor, classes: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the output of a layer inside the backbone as a map.

    Returns:
      The map and the gradients of the logits, float32 (batch, height', width', channels).
    """
    backbone = model.backbone
    # What crosses the cut behind the layer: for a transformer, also the tokens that the block's
    # branch is added to.
    after = backbone.layers.index(layer) + 1
    others = [t for t in crossing_tensors(backbone, after) if t is not layer.output]
    below = keras.Model(backbone.input, [*others, layer.output])
    above = keras.Model([*others, layer.output], backbone.output)
    *fixed, values = tf.nest.flatten(below(images, training=False))
    gradients = _gradients(
        model, lambda changed: above([*fixed, changed], training=False), values, classes
    )
    if len(values.shape) == 4:
        return tf.cast(values, tf.float32), tf.cast(gradients, tf.float32)
    return to_map(backbone, values), to_map(backbone, gradients)
