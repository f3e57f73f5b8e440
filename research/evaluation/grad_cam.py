"""Where a model looks: Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391)."""

from __future__ import annotations

import tensorflow as tf

from research.models.network import Network


def grad_cam(network: Network, images: tf.Tensor, classes: tf.Tensor) -> tf.Tensor:
    """Returns how much each place speaks for a class.

    Taken from the backbone's last feature map, whose channels are weighted by the mean gradient of
    the class's logit. It has as many places as that map, about one each 32 pixels of the image.

    Args:
      network: of photos.
      images: as the backbone takes them, (batch, height, width, 3).
      classes: int (batch,), the class of each; of two classes, the first one's logit is minus that
        of the second.

    Returns:
      float32 (batch, height', width') in [0, 1], 1 where most in the image; all 0 where nothing
      speaks for the class.
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
