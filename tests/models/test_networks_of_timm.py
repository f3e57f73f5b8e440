"""Tests of ConvNeXt V2 and MobileNetV4: features of timm, cuts, number formats and exports."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from benchmarks.timm_forward import photos
from research.evaluation.grad_cam import grad_cam
from research.loop.steps import Network
from research.models.backbone import POOLING, stage_starts
from research.models.backbone_table import BACKBONES, keras_preprocessing
from research.models.convnext_v2 import build_convnext_v2
from research.models.mobilenet_v4 import build_mobilenet_v4
from research.models.split import crossing_tensors, split_backbone
from research.models.weights import load_weights
from research.models.wrapper import Wrapper, freeze_below
from research.serving.export import write_onnx
from research.system.errors import UserError
from tests.helpers import randomize_head
from tests.models.safetensors_files import write_safetensors
from tests.models.test_torch_weights import features_of, state_of

NAMES = ("small_convnext_v2", "small_mobilenet_v4")
ENTRIES = {"small_convnext_v2": "ConvNeXtV2Atto", "small_mobilenet_v4": "MobileNetV4ConvSmall"}
SIZES = {"small_convnext_v2": (32, 75), "small_mobilenet_v4": (64, 75)}


def build(name: str, size: int) -> keras.Model:
    """The networks of `benchmarks/timm_reference.py`."""
    if name == "small_convnext_v2":
        return build_convnext_v2((size, size, 3), None, name, (1, 1, 2, 1), (8, 16, 24, 32))
    blocks = ("c3:16 c1:8", "e3x4:8", "u53x2:16 u00x2:16", "u30x2:16 u05x4:16", "c1:24")
    return build_mobilenet_v4((size, size, 3), None, name, 8, *blocks)


def one_block() -> keras.Model:
    """ConvNeXt V2 with new weights."""
    return build_convnext_v2((32, 32, 3), None, "one_block", (1,), (8,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("weights")


def loaded(name: str, size: int, folder: Path) -> keras.Model:
    """A network with the weights for which timm computed its features."""
    path, model = folder / f"{name}.safetensors", build(name, size)
    write_safetensors(path, state_of(name))
    load_weights(model, str(path))
    return model


@pytest.fixture(scope="module")
def trained(folder):
    """Returns a network for photos of 75 pixels, which no test may change."""
    return functools.cache(lambda name: loaded(name, 75, folder))


def scaled(size: int) -> tf.Tensor:
    return keras_preprocessing("densenet")(photos(size))


@pytest.mark.parametrize("name", NAMES)
def test_features_are_those_of_timm_also_at_another_size(name, trained, folder):
    for size in SIZES[name]:
        model = trained(name) if size == 75 else loaded(name, size, folder)
        found, wanted = model(scaled(size)).numpy(), features_of(name, size)
        assert found.shape == (2, 1, 1, model.output_shape[-1])
        assert np.abs(found.ravel() - wanted).max() < 1e-4 * np.abs(wanted).max()
        assert np.abs(found[0] - found[1]).max() > 0.1  # the photos differ


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_at_every_layer_gives_the_features_of_the_whole(name, trained):
    model, images = trained(name), scaled(75)
    freeze_below(model, 0, "frozen")  # BatchNorm is folded
    wanted = model(images).numpy()
    for index in range(2, len(model.layers)):
        assert all(tensor.shape[0] is None for tensor in crossing_tensors(model, index))
        if index % 20 == 0:
            parts = split_backbone(model, index)
            found = parts.features(parts.activations(images), tf.ones(2), training=False)
            assert found.numpy() == pytest.approx(wanted, abs=1e-5)
    starts = stage_starts(model, BACKBONES[ENTRIES[name]])
    assert list(starts.values()) == sorted(set(starts.values()))
    assert [len(crossing_tensors(model, start)) for start in starts.values()][1:] == [1] * (
        len(starts) - 1
    )


def test_gradients_of_all_variables_in_float16():
    """Squares of these activations overflow in float16."""
    keras.config.set_dtype_policy("mixed_float16")
    try:
        half = one_block()
    finally:
        keras.config.set_dtype_policy("float32")
    whole, images = one_block(), photos(32)
    random = np.random.default_rng(0)
    for one, other in zip(half.weights, whole.weights, strict=True):
        value = random.uniform(0.5, 1, one.shape)
        one.assign(value)
        other.assign(value)
    with tf.GradientTape() as tape:
        features = half(images)
        loss = tf.reduce_sum(tf.cast(features, tf.float32) ** 3)
    assert features.dtype == tf.float16
    assert np.asarray(features) == pytest.approx(whole(images).numpy(), rel=0.02, abs=0.02)
    for gradient in tape.gradient(loss, half.trainable_variables):
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_a_grey_photo_has_gradients():
    """All norms of Global Response Normalization are 0 for new weights, whose biases are 0."""
    model = one_block()
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(tf.zeros((1, 32, 32, 3))) ** 2)
    for gradient in tape.gradient(loss, model.trainable_variables):
        assert np.isfinite(gradient).all()


def test_grad_cam_has_the_last_map_before_the_pooling(trained):
    backbone, images = trained("small_mobilenet_v4"), scaled(75)
    model = randomize_head(Wrapper(backbone, 3))
    found = grad_cam(Network(model, split_backbone(backbone, 9)), images, tf.constant([0, 2]))
    pooling = backbone.get_layer(POOLING)
    features = keras.Model(backbone.input, pooling.input)(images)
    above = keras.Model(pooling.output, backbone.output)
    pooled = pooling(features)
    with tf.GradientTape() as tape:
        tape.watch(pooled)
        logits = tf.gather(model.head(model.pooling(above(pooled))), [0, 2], batch_dims=1)
    maps = np.maximum((tape.gradient(logits, pooled) * features).numpy().sum(axis=-1), 0)
    assert found.shape == features.shape[:3]
    maps /= np.maximum(maps.max(axis=(1, 2), keepdims=True), 1e-30)
    assert maps.max() == 1
    assert found.numpy() == pytest.approx(maps, abs=1e-3)


def test_onnx_also_of_the_layers_of_convnext_and_efficientnet_in_keras(tmp_path):
    """The exporter has no grouped convolutions and no erfc, and makes constants inputs."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("tf2onnx")
    images = keras.Input((32, 32, 3))
    scale = keras.layers.Normalization(mean=[100.0, 110.0, 120.0], variance=[4.0, 9.0, 16.0])
    grouped = keras.layers.Conv2D(3, 3, padding="same", groups=3, bias_initializer="normal")
    other = keras.layers.Activation("gelu")(grouped(scale(images)))
    pooled = keras.layers.GlobalAveragePooling2D(keepdims=True)(other)
    model = keras.Model(images, keras.layers.Concatenate()([one_block()(images), pooled]))
    wanted = model(photos(32)).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras's exporter reads an attribute of NumPy 1
        write_onnx(model, tmp_path / "model.onnx")
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    found = session.run(None, {"pixels": photos(32)})[0]
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-4)


def test_an_operation_that_onnx_does_not_have_is_named(tmp_path):
    pytest.importorskip("tf2onnx")
    images = keras.Input((2, 2, 1))
    model = keras.Model(images, keras.layers.Dense(1, activation="gelu")(images))
    with warnings.catch_warnings(), pytest.raises(UserError) as caught:
        warnings.simplefilter("ignore")
        write_onnx(model, tmp_path / "model.onnx")
    assert str(caught.value) == (
        "format is 'onnx', but the model has Erfc, which ONNX does not have; choose "
        "--format=saved_model, keras or tflite"
    )
