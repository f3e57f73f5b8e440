"""BatchNorm in training mode, whose statistics are those of the photos that count."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf


class WeightedBatchNorm(keras.layers.Layer):
    """A trained `BatchNormalization` (Ioffe and Szegedy 2015, arXiv 1502.03167) that knows weights.

    The photos that fill up a short batch weigh nothing and do not move the statistics, so that
    these do not depend on how a batch falls on the devices. A device without a photo that counts
    uses the moving statistics and leaves them alone, and so does one whose activations overflowed.
    The variables are those of the layer given.

    Args:
      norm: the layer to compute as; over the last axis. Where it is `synchronized`, the statistics
        are those of all devices together.
    """

    def __init__(self, norm: keras.layers.BatchNormalization) -> None:
        super().__init__(name=f"{norm.name}_weighted", dtype=norm.dtype_policy)
        self.norm = norm
        self.built = True

    def call(self, inputs: tf.Tensor, weight: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Normalizes (batch, ..., channels); `weight` is float32 (batch,)."""
        norm = self.norm
        values = tf.cast(inputs, tf.float32)
        mean, variance = (
            tf.convert_to_tensor(norm.moving_mean),
            tf.convert_to_tensor(norm.moving_variance),
        )
        if training:
            mean, variance = self._batch_statistics(values, tf.cast(weight, tf.float32))
        scale = tf.math.rsqrt(variance + norm.epsilon)
        if norm.scale:
            scale *= norm.gamma
        offset = -mean * scale
        if norm.center:
            offset += norm.beta
        return tf.cast(values * scale + offset, self.compute_dtype)

    def _batch_statistics(
        self, values: tf.Tensor, weight: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns mean and variance, float32 (channels,), and moves the moving ones."""
        norm = self.norm
        places = list(range(1, len(values.shape) - 1))
        size = tf.cast(tf.reduce_prod(tf.shape(values)[1:-1]), tf.float32)

        def weighted_sum(tensor: tf.Tensor) -> tf.Tensor:
            # Divided by the places first: in a large batch a sum of squares loses digits.
            return tf.linalg.matvec(tf.reduce_sum(tensor, places) / size, weight, transpose_a=True)

        sums = tf.concat([weighted_sum(values), [tf.reduce_sum(weight)]], axis=0)
        sums = self._over_devices(sums)  # in one exchange
        count = sums[-1]
        mean = tf.math.divide_no_nan(sums[:-1], count)
        # The variance does not change with the mean, to first order: as in tf.nn.moments, nothing
        # is differentiated there.
        squares = tf.math.squared_difference(values, tf.stop_gradient(mean))
        variance = tf.math.divide_no_nan(self._over_devices(weighted_sum(squares)), count)
        mean = tf.where(count > 0, mean, norm.moving_mean)
        variance = tf.where(count > 0, variance, norm.moving_variance)
        for moving, found in ((norm.moving_mean, mean), (norm.moving_variance, variance)):
            moved = moving * norm.momentum + found * (1.0 - norm.momentum)
            keep = (count == 0) | ~tf.math.is_finite(moved)
            moving.assign(tf.where(keep, moving, moved))
        return mean, variance

    def _over_devices(self, tensor: tf.Tensor) -> tf.Tensor:
        if not self.norm.synchronized:
            return tensor
        context = tf.distribute.get_replica_context()
        return context.all_reduce(tf.distribute.ReduceOp.SUM, tensor)


def weigh_batch_norm(model: keras.Model) -> keras.Model:
    """Returns a model that shares all layers, with a last input more: the examples' weights.

    The model itself is returned where no BatchNorm in it is trained.
    """
    if not any(_is_weighable(layer) for layer in model.layers):
        return model
    weight = keras.Input((), name="weight")
    inputs = [keras.Input(batch_shape=t.shape, dtype=t.dtype, name=t.name) for t in model.inputs]
    # Until a layer takes the weights, an output of their own connects them.
    outputs = [*model.outputs, keras.layers.Identity(name="weight_output")(weight)]
    whole = keras.Model([*model.inputs, weight], outputs, name=model.name)

    def replace(layer: keras.layers.Layer) -> keras.layers.Layer:
        return WeightedBatchNorm(layer) if _is_weighable(layer) else layer

    def call(layer: keras.layers.Layer, *arguments: Any, **options: Any) -> Any:
        if isinstance(layer, WeightedBatchNorm):
            return layer(arguments[0], weight)
        return layer(*arguments, **options)

    clone = keras.models.clone_model(
        whole, input_tensors=[*inputs, weight], clone_function=replace, call_function=call
    )
    *outputs, _ = clone.outputs
    return keras.Model(clone.inputs, outputs[0] if len(outputs) == 1 else outputs, name=model.name)


def takes_weights(model: keras.Model) -> bool:
    """Tells whether `weigh_batch_norm` gave the model a last input for weights."""
    return any(isinstance(layer, WeightedBatchNorm) for layer in model.layers)


def _is_weighable(layer: keras.layers.Layer) -> bool:
    return (
        type(layer) is keras.layers.BatchNormalization
        and layer.trainable
        and not getattr(layer, "renorm", False)
        and layer.axis in (-1, len(layer._inbound_nodes[0].input_tensors[0].shape) - 1)
    )
