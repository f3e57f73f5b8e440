"""Grad-CAM heat maps (Selvaraju et al. 2017, arXiv 1610.02391)."""

from __future__ import annotations

import tensorflow as tf

from research.loop.steps import Network


def grad_cam(network: Network, images: tf.Tensor, classes: tf.Tensor) -> tf.Tensor:
    """Returns a heat map of the evidence for a class, for each image.

    The map is the sum of the channels of the backbone's last feature map, weighted by the mean
    gradient of the class's logit. It has the resolution of that feature map: about one value per 32
    pixels of the image.

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
    features = parts.features(network.activations(batch), batch["weight"], training=False)
    features = tf.cast(features, tf.float32)
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(features)
        logits = model.head(model.pooling(features), training=False)
        if logits.shape[-1] == 1:
            logits = tf.concat([-logits, logits], axis=-1)
        of_class = tf.gather(logits, classes, batch_dims=1)
    gradients = tape.gradient(of_class, features)
    weights = tf.reduce_mean(gradients, axis=(1, 2), keepdims=True)
    maps = tf.nn.relu(tf.reduce_sum(weights * features, axis=-1))
    return tf.math.divide_no_nan(maps, tf.reduce_max(maps, axis=(1, 2), keepdims=True))
