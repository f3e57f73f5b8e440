"""Tests of the vision transformers: features of timm, sizes, cuts, number formats and exports."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from benchmarks.harness import RESULTS
from benchmarks.timm_forward import photos, random_state
from benchmarks.timm_reference import KINDS, SMALL_NETWORKS, timm_name
from research.models.backbone import build_backbone
from research.models.backbone_table import BACKBONES, keras_preprocessing
from research.models.split import crossing_tensors, split_backbone
from research.models.vision_transformer import build_vision_transformer, interpolation_matrix
from research.models.weights import load_weights
from research.serving.export import write_onnx, write_tflite
from research.settings.train_config import TrainConfig
from research.system.errors import UserError
from research.train import train
from tests.helpers import SMALL_CONFIG, draw_photos, read_checkpoint, read_metrics
from tests.models.safetensors_files import write_safetensors

SMALL: dict[str, dict[str, Any]] = {
    "small_vit": {"width": 128, "depth": 2, "patch": 8, "trained_size": 24},
    "small_dinov2": {
        "width": 64,
        "depth": 2,
        "patch": 7,
        "trained_size": 35,
        "registers": 4,
        "layer_scale": 0.1,
        "with_mean": True,
    },
}
SCALING = {"small_vit": "resnet_v2", "small_dinov2": "densenet"}


def build(name: str, size: int, **changes: Any) -> keras.Model:
    return build_vision_transformer((size, size, 3), None, name, **{**SMALL[name], **changes})


@functools.cache
def reference() -> dict[str, Any]:
    """What timm computed: see benchmarks/timm_reference.py."""
    return json.loads((RESULTS / "timm_reference.json").read_text())


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A folder with the weights for which timm computed its features."""
    folder = tmp_path_factory.mktemp("weights")
    for name, network in reference()["small_networks"].items():
        shapes = {key: tuple(map(int, shape.split())) for key, shape in network["tensors"].items()}
        write_safetensors(folder / f"{name}.safetensors", random_state(shapes))
    return folder


def features_of_timm(name: str, size: int) -> np.ndarray:
    text = reference()["small_networks"][name]["features"][str(size)]
    return np.array(text.split(), np.float32).reshape(2, -1)


@pytest.fixture(scope="module")
def trained(weights) -> keras.Model:
    """The small DINOv2 with all its parts, with weights, which no test may change."""
    model = build("small_dinov2", 21)
    load_weights(model, str(weights / "small_dinov2.safetensors"))
    return model


def scaled(name: str, size: int) -> tf.Tensor:
    return keras_preprocessing(SCALING[name])(photos(size))


@pytest.mark.parametrize(
    ("name", "size"), [(job["name"], size) for job in SMALL_NETWORKS[:2] for size in job["sizes"]]
)
def test_features_are_those_of_timm_also_at_another_size(name, size, weights):
    model = build(name, size)
    load_weights(model, str(weights / f"{name}.safetensors"))
    found = model(scaled(name, size)).numpy().reshape(2, -1)
    wanted = features_of_timm(name, size)[:, : found.shape[1]]
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert np.abs(wanted[0] - wanted[1]).max() > 0.1  # the photos differ


def test_every_network_with_names_of_timm_was_compared_with_timm_at_two_sizes():
    rows = reference()["rows"]
    assert all(row["deviation"] < 1e-4 for row in rows)
    for name in BACKBONES:
        if name.startswith(KINDS):
            found = [row for row in rows if row["backbone"] == name]
            assert len({row["size"] for row in found}) == 2, name
            assert {row["timm"] for row in found} == {timm_name(name)}


@pytest.mark.parametrize(("size", "trained"), [(16, 37), (24, 14), (5, 37), (37, 37)])
def test_the_interpolation_is_that_of_pillow(size, trained):
    values = np.random.default_rng(0).normal(size=trained).astype(np.float32)
    column = Image.fromarray(np.repeat(values[:, np.newaxis], 2, axis=1))
    resized = np.asarray(column.resize((2, size), Image.Resampling.BICUBIC))[:, 0]
    assert interpolation_matrix(size, trained) @ values == pytest.approx(resized, abs=1e-5)


def test_a_cut_at_every_layer_gives_the_features_of_the_whole(trained):
    images = scaled("small_dinov2", 21)
    wanted = trained(images).numpy()
    names = [layer.name for layer in trained.layers]
    for index in range(2, len(names)):
        tensors = crossing_tensors(trained, index)
        assert all(tensor.shape[0] is None for tensor in tensors)
        if names[index].endswith("norm1"):
            assert len(tensors) == 1
        lower = keras.Model(trained.input, tensors)(images)
        assert all(len(tensor) == 2 for tensor in tf.nest.flatten(lower))  # one row per photo
        if index % 5 == 0:
            parts = split_backbone(trained, index)
            found = parts.features(parts.activations(images), tf.ones(2), training=False)
            assert found.numpy() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("policy", "tolerance"), [("mixed_float16", 0.01), ("mixed_bfloat16", 0.05)]
)
def test_other_number_formats(policy, tolerance, trained):
    keras.config.set_dtype_policy(policy)
    try:
        half = build("small_dinov2", 21)
    finally:
        keras.config.set_dtype_policy("float32")
    half.set_weights(trained.get_weights())
    found, wanted = half(scaled("small_dinov2", 21)), trained(scaled("small_dinov2", 21)).numpy()
    assert found.dtype == half.compute_dtype == policy.removeprefix("mixed_")
    assert np.abs(np.asarray(found, np.float32) - wanted).max() < tolerance * np.abs(wanted).max()


def test_xla_and_gradients_of_all_variables(trained):
    images = scaled("small_dinov2", 21)

    @tf.function(autograph=False, jit_compile=True)
    def compiled(batch):
        with tf.GradientTape() as tape:
            features = trained(batch, training=True)
            loss = tf.reduce_sum(features**3)
        return features, tape.gradient(loss, trained.trainable_variables)

    features, gradients = compiled(images)
    assert features.numpy() == pytest.approx(trained(images).numpy(), abs=1e-5)
    assert all(isinstance(gradient, tf.Tensor) for gradient in gradients)
    assert all(np.abs(gradient).max() > 0 for gradient in gradients)


def test_tflite_and_onnx(tmp_path):
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("tf2onnx")
    images = scaled("small_dinov2", 21).numpy()
    model = build("small_dinov2", 21, depth=1)
    wanted = model(images).numpy()
    write_tflite(model, tmp_path / "model.tflite")
    lite = interpreter.Interpreter(str(tmp_path / "model.tflite"))
    runner = lite.get_signature_runner("serving_default")
    assert runner(pixels=images)["probabilities"] == pytest.approx(wanted, abs=1e-4)
    with warnings.catch_warnings():  # Keras's exporter reads an attribute of NumPy 1
        warnings.simplefilter("ignore", FutureWarning)
        write_onnx(model, tmp_path / "model.onnx")
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    assert session.run(None, {"pixels": images})[0] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("ending", ["weights.h5", "keras", "h5"])
def test_files_of_keras_also_for_another_size(ending, trained, tmp_path):
    """An exported classifier contains the backbone as one layer."""
    path = tmp_path / f"file.{ending}"
    images = keras.Input((21, 21, 3))
    pooled = keras.layers.GlobalAveragePooling2D()(trained(images))
    classifier = keras.Model(images, keras.layers.Dense(2)(pooled))
    (classifier.save_weights if ending == "weights.h5" else classifier.save)(path)
    loaded = build("small_dinov2", 35)
    assert load_weights(loaded, str(path)).left_out == 2
    for one, same in zip(loaded.weights, trained.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), same.numpy())


@pytest.mark.parametrize("ending", ["weights.h5", "keras", "h5"])
def test_scaled_branches_do_not_fit_a_network_without_them(ending, tmp_path):
    """All other layers have the same shapes: those of DeiT III and of DeiT."""
    scaled, path = build("small_vit", 24, depth=3, layer_scale=0.1), tmp_path / f"file.{ending}"
    (scaled.save_weights if ending == "weights.h5" else scaled.save)(path)
    with pytest.raises(UserError, match=r"does not fit: it has (6 layers of the kind|the layer)"):
        load_weights(build("small_vit", 24, depth=3), str(path))


def test_a_run_learns_and_continues_with_identical_weights(tmp_path, monkeypatch, capsys):
    """The block is trained from cached outputs of the embedding."""

    def build_small(input_shape: tuple[int, int, int], weights: str | None) -> keras.Model:
        return build_vision_transformer(input_shape, weights, "small", 64, 1, 16, 32)

    (tmp_path / "photos").mkdir()
    entry = BACKBONES["ViTTiny"]
    entry = dataclasses.replace(entry, build=build_small, stages=entry.stages[:2])
    monkeypatch.setitem(BACKBONES, entry.name, entry)  # type: ignore[arg-type]
    config = dataclasses.replace(
        SMALL_CONFIG,
        image_folder=str(draw_photos(tmp_path / "photos", 24)),
        backbone=entry.name,
        unfreeze_from="block0",
        head_epochs=0,
        head_optimizer="sgd",
        head_schedule="constant",
        backbone_optimizer="sgd",
        backbone_schedule="constant",
        backbone_learning_rate=0.01,
        warmup="0steps",
        trunk_cache="memory",
        epochs=2,
        distribution="none",  # and not on all logical devices of the tests
    )
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    train(dataclasses.replace(config, ckpt_dir=str(run)))
    first, last = (row["train_loss"] for row in read_metrics(run))
    assert last < first
    shutil.copytree(run, resumed)
    latest = tf.train.latest_checkpoint(str(resumed / "checkpoints" / "latest"))
    Path(f"{latest}.data-00000-of-00001").write_bytes(b"damaged")  # the first epoch is left
    train(dataclasses.replace(config, ckpt_dir=str(resumed)))
    whole, parts = read_checkpoint(run), read_checkpoint(resumed)
    assert whole.keys() == parts.keys()
    for name, values in whole.items():
        np.testing.assert_array_equal(parts[name], values, err_msg=name)
    printed = capsys.readouterr().out
    assert printed.count("trunk cache  activations in memory") == 2  # both runs train
    assert "BatchNorm" not in printed  # there is none


def test_sizes_are_multiples_of_the_patch():
    with pytest.raises(UserError) as caught:
        TrainConfig(backbone="DINOv2Small", weights="none", image_size=160)
    assert str(caught.value) == (
        "image_size is 160; DINOv2Small has patches of 14 pixels: expected a multiple, such as 154 "
        "or 168"
    )
    config = TrainConfig(
        backbone="DINOv2Small", weights="none", image_size=224, evaluation_scale=1.2
    )
    assert config.evaluation_size == 266  # 1.2 times 224 is 268.8
    config = TrainConfig(backbone="ViTTiny", weights="none", evaluation_scale=1.2)
    assert config.evaluation_size == 192


def test_there_are_no_imagenet_weights():
    with pytest.raises(UserError) as caught:
        build_backbone(BACKBONES["ViTTiny"], 32, "imagenet")
    assert str(caught.value) == (
        "weights is 'imagenet'; ViTTiny has no ImageNet weights: give --weights=FILE, or "
        "--weights=none to train from scratch"
    )
