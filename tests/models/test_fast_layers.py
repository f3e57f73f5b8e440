from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from research.models.backbone import build_backbone
from research.models.backbone_table import find_backbone
from research.models.fast_layers import (
    FoldedConvolution,
    FrozenBatchNorm,
    PointwiseConvolution,
    with_fast_layers,
)
from research.models.residual import build_small_resnet
from research.models.split import split_backbone
from research.models.wrapper import freeze_below
from research.system import devices

IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 48, 48, 3)).astype("f4")
WEIGHT = tf.ones(len(IMAGES))


def with_random_statistics(model: keras.Model) -> keras.Model:
    """Gives each BatchNorm random statistics, scale and offset."""
    generator = np.random.default_rng(1)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            for variable in layer.variables:
                low, high = (0.5, 1.5) if variable.name in ("gamma", "moving_variance") else (-1, 1)
                variable.assign(generator.uniform(low, high, variable.shape))
    return model


def count(model: keras.Model, kind: type) -> int:
    return sum(isinstance(layer, kind) for layer in model.layers)


# Convolutions with bias (ResNet50), depthwise (MobileNetV2), and BatchNorm first (ResNet50V2).
@pytest.mark.parametrize("name", ["ResNet50", "MobileNetV2", "ResNet50V2"])
def test_folded_backbones_compute_the_same(name):
    model = with_random_statistics(build_backbone(find_backbone(name), 48, None))
    freeze_below(model, 0, "frozen")
    folded = with_fast_layers(model)
    folds = count(folded, FoldedConvolution)
    assert folds > 10
    norms = count(model, keras.layers.BatchNormalization)
    assert count(folded, FrozenBatchNorm) == norms - folds
    assert count(folded, keras.layers.BatchNormalization) == 0
    expected = model(IMAGES, training=False).numpy()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(folded(IMAGES) / scale, expected / scale, atol=1e-5)


def padded(zeros, convolution: keras.layers.Layer, side: int | None = 48, again: bool = False):
    """Returns a model of zeros and a convolution; `again` uses the padded images twice."""
    images = keras.Input((side, side, 3))
    with_zeros = keras.layers.ZeroPadding2D(zeros)(images)
    outputs = convolution(with_zeros)
    return keras.Model(images, [outputs, with_zeros] if again else outputs)


def conv(kernel: int, strides: int = 1, **options):
    return keras.layers.Conv2D(4, kernel, strides, activation="relu", **options)


def depthwise(kernel: int, strides: int = 1):
    return keras.layers.DepthwiseConv2D(kernel, strides)


@pytest.mark.parametrize(
    ("model", "is_folded"),
    [
        (lambda: padded(1, conv(3)), True),
        (lambda: padded(1, conv(3), side=None), False),  # the size of the input is not known
        (lambda: padded(((0, 1), (0, 1)), depthwise(3, 2)), True),
        (lambda: padded(1, depthwise(3, 2)), False),  # "same" adds no zeros before an even side
        (lambda: padded(1, depthwise(3, 2), side=47), True),
        (lambda: padded(((1, 2), (1, 2)), depthwise(5, 2)), True),
        (lambda: padded(((2, 1), (1, 2)), depthwise(5, 2)), False),
        (lambda: padded(2, conv(5, use_bias=False)), True),
        (lambda: padded(1, conv(5)), False),
        (lambda: padded(2, conv(3, dilation_rate=2)), False),
        (lambda: padded(1, conv(3, padding="same")), False),
        (lambda: padded(1, conv(3), again=True), False),
    ],
)
def test_zeros_before_a_convolution_are_folded_if_same_padding_adds_them(model, is_folded):
    model = model()
    folded = with_fast_layers(model)
    assert count(folded, FoldedConvolution) == is_folded
    assert count(folded, keras.layers.ZeroPadding2D) == (not is_folded)
    if is_folded:
        images = IMAGES[:, : model.input.shape[1], : model.input.shape[2]]
        computed = (results(one, model, images) for one in (model, folded))
        for expected, found in zip(*computed, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def shared_layers(is_convolution_shared: bool, kind: type) -> keras.Model:
    """Returns a model that calls a convolution twice, or the layer before or after it."""
    images = keras.Input((48, 48, 3))
    convolution = keras.layers.Conv2D(3, 3)
    other = keras.layers.ZeroPadding2D(1) if kind is keras.layers.ZeroPadding2D else kind()
    pair = (other, convolution) if kind is keras.layers.ZeroPadding2D else (convolution, other)
    again = convolution if is_convolution_shared else other
    return keras.Model(images, [pair[1](pair[0](images)), again(images)])


@pytest.mark.parametrize("kind", [keras.layers.ZeroPadding2D, keras.layers.BatchNormalization])
@pytest.mark.parametrize("is_convolution_shared", [True, False])
def test_a_layer_that_is_called_twice_is_not_folded(is_convolution_shared, kind):
    model = with_random_statistics(shared_layers(is_convolution_shared, kind))
    freeze_below(model, 0, "frozen")
    folded = with_fast_layers(model)
    assert count(folded, FoldedConvolution) == 0
    for expected, found in zip(model(IMAGES, training=False), folded(IMAGES), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("name", "left"), [("MobileNetV2", 0), ("ResNet50V2", 5)])
def test_zeros_of_backbones_are_folded(name, left):
    """Those before max pooling, and before steps of two pixels with an even side, are left."""
    folded = with_fast_layers(build_backbone(find_backbone(name), 160, None))
    assert count(folded, keras.layers.ZeroPadding2D) == left


def test_batch_norm_without_a_scale_is_folded():
    images = keras.Input((8, 8, 3))
    outputs = keras.layers.Conv2D(4, 3, strides=2, padding="same", dilation_rate=1)(images)
    outputs = keras.layers.BatchNormalization(scale=False)(outputs)
    model = with_random_statistics(keras.Model(images, outputs))
    freeze_below(model, 0, "frozen")
    folded = with_fast_layers(model)
    assert count(folded, FoldedConvolution) == 1
    expected = model(IMAGES[:, :8, :8], training=False)
    np.testing.assert_allclose(folded(IMAGES[:, :8, :8]), expected, atol=1e-5)


def build_resnet() -> keras.Model:
    return with_random_statistics(build_small_resnet((48, 48, 3), None))


def build_separable(dtype: str = "float32", use_bias: bool = True) -> keras.Model:
    """Returns convolutions of one pixel and depthwise ones, with BatchNorm, and one at the end."""
    keras.utils.set_random_seed(0)
    images = keras.Input((48, 48, 3))
    outputs = images
    for layer in (
        keras.layers.Conv2D(8, 1, use_bias=use_bias, dtype=dtype),
        keras.layers.DepthwiseConv2D(3, strides=2, padding="same", use_bias=use_bias, dtype=dtype),
        keras.layers.Conv2D(16, 1, strides=2, use_bias=use_bias, dtype=dtype),
        keras.layers.DepthwiseConv2D(3, padding="same", use_bias=use_bias, dtype=dtype),
        keras.layers.Conv2D(4, 1, use_bias=False, dtype=dtype),
    ):
        outputs = keras.layers.BatchNormalization(dtype=dtype)(layer(outputs))
        outputs = keras.layers.LeakyReLU(dtype=dtype)(outputs)
    outputs = keras.layers.BatchNormalization(dtype=dtype)(outputs)  # no convolution before it
    return with_random_statistics(keras.Model(images, outputs))


def build_separable_without_bias() -> keras.Model:
    return build_separable(use_bias=False)  # BatchNorm in training mode removes a bias


def results(
    model: keras.Model, trained: keras.Model, images: np.ndarray = IMAGES
) -> list[np.ndarray]:
    """Returns the outputs of a model and the gradients for the variables of another."""
    values = [variable.value for variable in trained.trainable_variables]

    @tf.function(autograph=False)
    def compute() -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            outputs = tf.cast(model(images, training=True), tf.float32)
            loss = tf.reduce_sum(outputs**2)
        return [outputs, *tape.gradient(loss, values)]

    return [tensor.numpy() for tensor in compute()]


@pytest.mark.parametrize("has_gpu", [False, True])
@pytest.mark.parametrize(
    ("build", "bn_mode", "replaced"),
    [
        (build_resnet, "frozen", FoldedConvolution),
        (build_separable, "frozen", FoldedConvolution),
        (build_separable_without_bias, "train", PointwiseConvolution),
    ],
)
def test_outputs_and_gradients_equal_those_of_the_original(
    monkeypatch, build, bn_mode, replaced, has_gpu
):
    monkeypatch.setattr(devices, "has_gpu", lambda: has_gpu)  # computes pixels as a product
    model = build()
    freeze_below(model, 0, bn_mode)
    folded = with_fast_layers(model)
    assert count(folded, replaced) >= 2
    assert (count(folded, FrozenBatchNorm) > 0) == (bn_mode == "frozen" and not has_gpu)
    for expected, found in zip(results(model, model), results(folded, model), strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found / scale, expected / scale, atol=1e-4)
    assert {id(v) for v in folded.variables} == {id(v) for v in model.variables}


def test_in_bfloat16_folding_is_as_precise_as_batch_norm():
    exact, model = build_separable(), build_separable("mixed_bfloat16")
    for one in (exact, model):
        freeze_below(one, 0, "frozen")
    folded = with_fast_layers(model)
    assert count(folded, keras.layers.BatchNormalization) == 0
    assert count(folded, FrozenBatchNorm) == 1
    expected = results(exact, exact)
    errors = [
        [
            np.linalg.norm(found - right) / np.linalg.norm(right)
            for found, right in zip(all, expected, strict=True)
        ]
        for all in (results(model, model), results(folded, model))
    ]
    assert 1e-4 < np.mean(errors[1]) < 1.2 * np.mean(errors[0]) < 0.1
    assert model(IMAGES).dtype == folded(IMAGES).dtype == tf.bfloat16


def test_trained_batch_norm_is_not_folded():
    model = build_small_resnet((48, 48, 3), None)
    freeze_below(model, 0, "train")
    assert with_fast_layers(model) is model


def test_an_output_with_a_second_use_is_not_folded():
    images = keras.Input((8, 8, 3))
    convolved = keras.layers.Conv2D(3, 3, padding="same")(images)
    normalized = keras.layers.BatchNormalization()(convolved)
    model = with_random_statistics(keras.Model(images, keras.layers.Add()([convolved, normalized])))
    freeze_below(model, 0, "frozen")
    faster = with_fast_layers(model)
    assert (count(faster, FoldedConvolution), count(faster, FrozenBatchNorm)) == (0, 1)
    np.testing.assert_allclose(faster(IMAGES[:, :8, :8]), model(IMAGES[:, :8, :8]), atol=1e-5)


def test_both_parts_of_a_split_are_folded():
    model = with_random_statistics(build_backbone(find_backbone("MobileNetV2"), 48, None))
    freeze_below(model, 100, "frozen")
    parts = split_backbone(model, 100)
    assert count(parts.trunk, FoldedConvolution) > 10
    assert count(parts.rest, FoldedConvolution) > 10
    features = parts.features(parts.activations(IMAGES), WEIGHT, training=True)
    expected = model(IMAGES, training=False).numpy()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(features / scale, expected / scale, atol=1e-5)
    trained = {id(v) for v in parts.rest.trainable_variables}
    assert trained == {id(v) for v in model.trainable_variables}
