from __future__ import annotations

from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf

from research.models.batch_norm import (
    WeightedBatchNorm,
    takes_weights,
    trained_statistics,
    weigh_batch_norm,
)

VALUES = np.random.default_rng(0).normal(3, 2, (6, 4, 4, 5)).astype("f4")
ALL = np.ones(6, "f4")


def make_norm(**settings) -> keras.layers.BatchNormalization:
    norm = keras.layers.BatchNormalization(**settings)
    norm.build((None, 4, 4, 5))
    generator = np.random.default_rng(1)
    for variable in norm.variables:
        variable.assign(generator.uniform(0.5, 2, variable.shape))
    return norm


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("settings", [{}, {"scale": False}, {"center": False}])
def test_with_equal_weights_it_computes_as_the_original_layer(training, settings):
    """Compares output, gradient and moving statistics."""
    plain, norm = make_norm(**settings), make_norm(**settings)
    weighted = WeightedBatchNorm(norm)
    values = tf.constant(VALUES)
    results = []
    for layer, arguments in ((plain, ()), (weighted, (ALL,))):
        with tf.GradientTape() as tape:
            tape.watch(values)
            outputs = layer(values, *arguments, training=training)
            loss = tf.reduce_sum(outputs**3)
        results.append((outputs, tape.gradient(loss, values)))
    for expected, found in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
    for expected, found in zip(plain.variables, norm.variables, strict=True):
        np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-5)


def test_padding_does_not_change_output_gradient_or_statistics():
    norm, other = make_norm(), make_norm()
    padded = VALUES.copy()
    padded[4:] = 1e6
    weight = np.array([1, 1, 1, 1, 0, 0], "f4")
    results = []
    for layer, photos, weights in ((norm, padded, weight), (other, VALUES[:4], ALL[:4])):
        values = tf.constant(photos)
        with tf.GradientTape() as tape:
            tape.watch(values)
            outputs = WeightedBatchNorm(layer)(values, weights, training=True)[:4]
            loss = tf.reduce_sum(outputs**3)
        results.append((outputs, tape.gradient(loss, values)[:4]))
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    for one, two in zip(norm.variables, other.variables, strict=True):
        np.testing.assert_allclose(one.numpy(), two.numpy(), rtol=1e-5)


@pytest.mark.parametrize("overflowed", [False, True])
def test_moving_statistics_ignore_padding_and_overflows(overflowed):
    norm, other = make_norm(), make_norm()
    values = VALUES.copy()
    values[0, 0, 0, :] = np.inf if overflowed else 0
    weight = ALL if overflowed else 0 * ALL
    outputs = WeightedBatchNorm(norm)(values, weight, training=True)
    for one, two in zip(norm.variables, other.variables, strict=True):
        np.testing.assert_array_equal(one.numpy(), two.numpy())
    if not overflowed:  # the moving statistics are used
        np.testing.assert_allclose(outputs, other(values, training=False), rtol=1e-4, atol=1e-5)


def test_float16_is_normalized_in_float32():
    """The squares of these values overflow float16, and its precision is too low for them."""
    norm = make_norm(dtype=keras.dtype_policies.DTypePolicy("mixed_float16"))
    outputs = WeightedBatchNorm(norm)(tf.cast(VALUES + 500, tf.float16), ALL, training=True)
    assert outputs.dtype == tf.float16
    plain = make_norm()
    expected = plain((VALUES + 500).astype("f2").astype("f4"), training=True)
    np.testing.assert_allclose(outputs, expected, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(norm.moving_mean.numpy(), plain.moving_mean.numpy(), rtol=1e-5)


def test_only_trained_batch_norm_layers_take_weights():
    image = keras.Input((4, 4, 5))
    first, second = keras.layers.BatchNormalization(), keras.layers.BatchNormalization()
    model = keras.Model(image, second(keras.layers.ReLU()(first(image))))
    first.trainable = False
    weighted = weigh_batch_norm(model)
    assert takes_weights(weighted)
    kinds = [type(layer).__name__ for layer in weighted.layers]
    assert kinds.count("WeightedBatchNorm") == kinds.count("BatchNormalization") == 1
    assert {id(v) for v in weighted.variables} == {id(v) for v in model.variables}
    np.testing.assert_allclose(
        weighted([tf.constant(VALUES), tf.constant(ALL)]), model(VALUES), rtol=1e-5, atol=1e-5
    )
    second.trainable = False
    assert weigh_batch_norm(model) is model


def test_the_statistics_of_a_head_are_averaged_over_devices_too():
    def network() -> keras.Sequential:
        return keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])

    model = SimpleNamespace(backbone=network(), head=network())
    wanted = [variable for part in (model.backbone, model.head) for variable in part.weights[2:]]
    assert [id(one) for one in trained_statistics(model)] == [id(one) for one in wanted]
    model.backbone.layers[0].trainable = False
    assert len(trained_statistics(model)) == 2


def test_other_state_of_trained_layers_is_averaged_and_that_of_generators_is_not():
    class Centred(keras.layers.Layer):
        def build(self, shape):
            self.centre = self.add_weight(shape=(3,), trainable=False, name="centre")

    head = keras.Sequential([keras.Input((3,)), Centred(), keras.layers.Dropout(0.5)])
    model = SimpleNamespace(backbone=keras.Sequential([keras.Input((3,))]), head=head)
    assert [variable.name for variable in trained_statistics(model)] == ["centre"]
