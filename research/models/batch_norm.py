"""BatchNorm whose batch statistics use the example weights, so that padding has no effect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf


class WeightedBatchNorm(keras.layers.Layer):
    """A trained `BatchNormalization` (Ioffe and Szegedy 2015, arXiv 1502.03167) with weights.

    Padding examples have weight 0 and do not change the statistics. The statistics therefore do not
    depend on how a batch is divided over the devices. A device whose examples all have weight 0,
    or whose activations overflowed, uses the moving statistics and does not update them. The layer
    shares the variables of the original layer.

    Args:
      norm: the original layer, which normalizes over the last axis. If it is `synchronized`, the
        statistics are computed over all devices.
    """

    def __init__(self, norm: keras.layers.BatchNormalization) -> None:
        super().__init__(name=f"{norm.name}_weighted", dtype=norm.dtype_policy)
        self.norm = norm
        self.built = True

    def compute_output_spec(
        self, inputs: keras.KerasTensor, weight: keras.KerasTensor, training: bool = False
    ) -> keras.KerasTensor:
        """Returns shape and dtype of the outputs, without tracing `call`."""
        return keras.KerasTensor(inputs.shape, self.compute_dtype)

    def call(self, inputs: tf.Tensor, weight: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Normalizes inputs (batch, ..., channels); `weight` is float32 (batch,)."""
        if not training:
            moving = self.norm.moving_mean, self.norm.moving_variance
            return self._normalize(inputs, *map(tf.convert_to_tensor, moving))
        weight = tf.cast(weight, tf.float32)
        if inputs.shape.rank != 4 or self.norm.synchronized:
            outputs, mean, variance, known = self._weighted(inputs, weight)
        else:
            # Usually, only the last batch of an epoch has padding.
            outputs, mean, variance, known = tf.cond(
                tf.reduce_all(weight == weight[0]) & (weight[0] > 0),
                lambda: self._unweighted(inputs),
                lambda: self._weighted(inputs, weight),
            )
        self._move_averages(mean, variance, known)
        return outputs

    def _normalize(self, inputs: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor) -> tf.Tensor:
        scale, offset = scale_and_offset(self.norm, mean, variance)
        return tf.cast(tf.cast(inputs, tf.float32) * scale + offset, self.compute_dtype)

    def _unweighted(self, inputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns what `_weighted` returns for equal weights, in fewer passes over the inputs."""
        norm, channels = self.norm, inputs.shape[-1]
        scale = tf.convert_to_tensor(norm.gamma) if norm.scale else tf.ones(channels)
        offset = tf.convert_to_tensor(norm.beta) if norm.center else tf.zeros(channels)
        outputs, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            inputs, scale, offset, epsilon=norm.epsilon
        )
        count = tf.cast(tf.size(inputs) / channels, tf.float32)
        # The operation returns the unbiased variance, though it normalizes with the biased one.
        return outputs, mean, variance * (count - 1) / count, tf.constant(True)

    def _weighted(
        self, inputs: tf.Tensor, weight: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns outputs, batch mean and variance, and whether any example has a weight."""
        mean, variance, known = self._batch_statistics(tf.cast(inputs, tf.float32), weight)
        return self._normalize(inputs, mean, variance), mean, variance, known

    def _batch_statistics(
        self, values: tf.Tensor, weight: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns mean and variance, float32 (channels,), and whether any example has a weight.

        Without such an example, mean and variance are the moving ones.
        """
        norm = self.norm
        positions = list(range(1, len(values.shape) - 1))
        size = tf.cast(tf.reduce_prod(tf.shape(values)[1:-1]), tf.float32)

        def weighted_sum(tensor: tf.Tensor) -> tf.Tensor:
            # Dividing by the number of positions first keeps the sums of squares precise.
            sums = tf.reduce_sum(tensor, positions) / size
            return tf.linalg.matvec(sums, weight, transpose_a=True)

        # One all-reduce for the sums and the weights.
        sums = self._all_reduce(tf.concat([weighted_sum(values), [tf.reduce_sum(weight)]], axis=0))
        count = sums[-1]
        mean = tf.math.divide_no_nan(sums[:-1], count)
        # The derivative of the variance with respect to the mean is zero, so it is not computed, as
        # in tf.nn.moments.
        squares = tf.math.squared_difference(values, tf.stop_gradient(mean))
        variance = tf.math.divide_no_nan(self._all_reduce(weighted_sum(squares)), count)
        mean = tf.where(count > 0, mean, norm.moving_mean)
        variance = tf.where(count > 0, variance, norm.moving_variance)
        return mean, variance, count > 0

    def _move_averages(self, mean: tf.Tensor, variance: tf.Tensor, known: tf.Tensor) -> None:
        """Updates the moving statistics, unless the batch tells nothing or overflowed."""
        norm = self.norm
        for moving, current in ((norm.moving_mean, mean), (norm.moving_variance, variance)):
            moved = moving * norm.momentum + current * (1.0 - norm.momentum)
            moving.assign(tf.where(known & tf.math.is_finite(moved), moved, moving))

    def _all_reduce(self, tensor: tf.Tensor) -> tf.Tensor:
        if not self.norm.synchronized:
            return tensor
        context = tf.distribute.get_replica_context()
        return context.all_reduce(tf.distribute.ReduceOp.SUM, tensor)


def scale_and_offset(
    norm: keras.layers.BatchNormalization, mean: tf.Tensor, variance: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the scale and the offset per channel that BatchNorm applies for given statistics."""
    scale = tf.math.rsqrt(variance + norm.epsilon)
    if norm.scale:
        scale *= norm.gamma
    offset = -mean * scale
    if norm.center:
        offset += norm.beta
    return scale, offset


def weigh_batch_norm(model: keras.Model) -> keras.Model:
    """Returns a model that shares all layers and takes the example weights as its last input.

    If the model has no trainable BatchNorm, it is returned unchanged.
    """
    if not any(_is_weighable(layer) for layer in model.layers):
        return model
    weight = keras.Input((), name="weight")
    inputs = [keras.Input(batch_shape=t.shape, dtype=t.dtype, name=t.name) for t in model.inputs]
    # No layer takes the weights yet. This additional output connects them to the model.
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
    """Returns whether the last input of a model is the example weights; see `weigh_batch_norm`."""
    return any(isinstance(layer, WeightedBatchNorm) for layer in model.layers)


def _is_weighable(layer: keras.layers.Layer) -> bool:
    return (
        type(layer) is keras.layers.BatchNormalization
        and layer.trainable
        and not getattr(layer, "renorm", False)
        and layer.axis in (-1, len(layer._inbound_nodes[0].input_tensors[0].shape) - 1)
    )


def trained_statistics(model: keras.Model) -> list[keras.Variable]:
    """Returns what trained layers change without gradients, such as the statistics of BatchNorm.

    The states of random generators are whole numbers, and are not among them.
    """
    return [
        variable
        for part in (model.backbone, model.head)
        for layer in part._flatten_layers()
        if layer.trainable
        for variable in layer._non_trainable_variables
        if tf.as_dtype(variable.dtype).is_floating
    ]


def compile_averaging(
    statistics: Sequence[keras.Variable], strategy: tf.distribute.Strategy
) -> Callable[[], None] | None:
    """Returns a function that gives all devices the mean of their statistics.

    Args:
      statistics: moving means and variances, which each device has changed by itself.
      strategy: whose devices.

    Returns:
      None if there is nothing to average.
    """
    if not statistics or strategy.num_replicas_in_sync == 1:
        return None

    def on_replica() -> None:
        context = tf.distribute.get_replica_context()
        values = [tf.identity(variable.value) for variable in statistics]
        means = context.all_reduce(tf.distribute.ReduceOp.MEAN, values)
        for variable, mean in zip(statistics, means, strict=True):
            variable.assign(mean)

    @tf.function(autograph=False)
    def average() -> None:
        strategy.run(on_replica)

    return average
