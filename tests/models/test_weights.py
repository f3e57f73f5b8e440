"""Tests of loading weights from all supported files, and of refusing all others unchanged."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import keras
import ml_dtypes
import numpy as np
import pytest
from keras import layers
from keras.src.applications import convnext, inception_v3

from research.models.backbone import build_backbone
from research.models.backbone_table import BACKBONES
from research.models.weights import LoadReport, load_weights
from research.system.errors import UserError
from tests.reliability.similar_backbones import check_group

REAL_WEIGHTS = (
    Path(__file__).resolve().parents[3] / "shared/weights/mobilenet_v2_160_dogs_notop.weights.h5"
)


def small_network(width: int = 4, third: str = "third_conv") -> keras.Model:
    """A network with the difficult cases: generated layer names, a shortcut, a nested model."""
    images = keras.Input((8, 8, 3))
    features = layers.Normalization(name="scaling")(images)
    first = layers.Conv2D(4, 3, padding="same")(features)
    second = layers.SeparableConv2D(width, 3, padding="same", name="second_conv")(first)
    normalized = layers.BatchNormalization()(second)
    inner = keras.Sequential([layers.Conv2D(width, 1), layers.BatchNormalization()], name="inner")
    summed = layers.Add()([inner(first), normalized])
    outputs = layers.Conv2D(width, 1, name=third)(layers.Dropout(0.5)(summed))
    return keras.Model(images, outputs, name="small_network")


def fill(model: keras.Model, seed: int) -> keras.Model:
    """Sets all variables to random values, as in a trained model."""
    random = np.random.default_rng(seed)
    for variable in model.weights:
        variable.assign(random.uniform(0.5, 1.5, variable.shape).astype(variable.dtype))
    model.get_layer("scaling").finalize_state()
    return model


def save(model: keras.Model, path: Path | str) -> None:
    """Saves the weights as *.weights.h5, or the model in another format."""
    (model.save_weights if str(path).endswith(".weights.h5") else model.save)(path)


def values(model: keras.Model) -> list[np.ndarray]:
    return [variable.numpy() for variable in model.weights]


def assert_equal(first: keras.Model, second: keras.Model) -> None:
    for left, right in zip(values(first), values(second), strict=True):
        np.testing.assert_array_equal(left, right)


def nested_classifier(backbone: keras.Model) -> keras.Model:
    """A typical classifier of a user, in which the backbone is one layer."""
    images = keras.Input((8, 8, 3))
    pooled = layers.GlobalAveragePooling2D()(backbone(layers.RandomFlip()(images)))
    return keras.Model(images, layers.Dense(2)(layers.BatchNormalization()(pooled)))


def sequential_classifier(backbone: keras.Model) -> keras.Model:
    head = [layers.GlobalAveragePooling2D(), layers.Dense(2)]
    return keras.Sequential([backbone, *head])


def flat_classifier(backbone: keras.Model) -> keras.Model:
    """A classifier that contains the layers of the backbone and some more."""
    features = layers.Conv2D(4, 1)(backbone.output)
    pooled = layers.GlobalAveragePooling2D()(features)
    return keras.Model(backbone.input, layers.Dense(2)(pooled))


def frozen_below_the_last_layers(backbone: keras.Model) -> keras.Model:
    """The layout of Keras 2 sorts the weights of a nested model by whether they are trainable."""
    for layer in backbone.layers[:-4]:
        layer.trainable = False
    return nested_classifier(backbone)


@pytest.mark.parametrize("ending", ["weights.h5", "keras", "h5"])
@pytest.mark.parametrize(
    ("saved", "left_out"),
    [
        (lambda backbone: backbone, 0),
        (nested_classifier, 6),
        (sequential_classifier, 2),
        (flat_classifier, 4),
        (frozen_below_the_last_layers, 6),
    ],
)
def test_every_kind_of_file_is_loaded_completely(
    saved: Callable[[keras.Model], keras.Model], left_out: int, ending: str, tmp_path: Path
) -> None:
    source = fill(small_network(), seed=1)
    path = str(tmp_path / f"file.{ending}")
    model = saved(source)
    save(model, path)
    loaded = fill(small_network(), seed=2)
    report = load_weights(loaded, path)
    assert_equal(loaded, source)
    images = np.random.default_rng(0).uniform(0, 2, (2, 8, 8, 3)).astype(np.float32)
    np.testing.assert_array_equal(loaded(images), source(images))
    assert report == LoadReport(path, len(source.weights), len(source.weights), left_out)


def test_compiled_and_trained_classifier(tmp_path: Path) -> None:
    source = fill(small_network(), seed=1)
    classifier = nested_classifier(source)
    classifier.compile("adam", "mse")
    classifier.train_on_batch(np.ones((2, 8, 8, 3)), np.ones((2, 2)))
    classifier.save(tmp_path / "trained.keras")
    loaded = fill(small_network(), seed=2)
    assert load_weights(loaded, str(tmp_path / "trained.keras")).left_out == 6
    assert_equal(loaded, source)


def test_subclassed_model_that_has_the_backbone_as_an_attribute(tmp_path: Path) -> None:
    class Wrapper(keras.Model):  # type: ignore[misc]
        def __init__(self, base_model: keras.Model) -> None:
            super().__init__()
            self.base_model = base_model
            self.head = layers.Dense(1)

        def call(self, images):  # type: ignore[no-untyped-def]
            return self.head(self.base_model(images))

    source = fill(small_network(), seed=1)
    wrapper = Wrapper(source)
    wrapper(np.zeros((1, 8, 8, 3), np.float32))
    wrapper.save_weights(tmp_path / "wrapper.weights.h5")
    loaded = fill(small_network(), seed=2)
    load_weights(loaded, str(tmp_path / "wrapper.weights.h5"))
    assert_equal(loaded, source)


def write_keras2_notop(model: keras.Model, path: Path, split: bool) -> None:
    """Writes the layout of keras.applications downloads: in order, with other layer names."""
    with h5py.File(path, "w") as file:
        stored = [layer for layer in model.layers if layer.weights]
        names = [f"old_{n}" for n in range(len(stored))]
        if split:
            file.attrs["layer_names0"] = [name.encode() for name in names[:2]]
            file.attrs["layer_names1"] = [name.encode() for name in names[2:]]
        else:
            file.attrs["layer_names"] = [name.encode() for name in names]
        for name, layer in zip(names, stored, strict=True):
            group = file.create_group(name)
            variables = layer.trainable_weights + layer.non_trainable_weights
            weight_names = [f"{name}/{n}:0" for n in range(len(variables))]
            group.attrs["weight_names"] = [weight.encode() for weight in weight_names]
            for weight, variable in zip(weight_names, variables, strict=True):
                group[weight] = variable.numpy()


@pytest.mark.parametrize("split", [False, True])
def test_keras2_file_with_other_names_is_read_in_order(split: bool, tmp_path: Path) -> None:
    source = fill(small_network(), seed=1)
    path = tmp_path / "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5"
    write_keras2_notop(source, path, split)
    loaded = fill(small_network(), seed=2)
    report = load_weights(loaded, str(path))
    assert_equal(loaded, source)
    reference = fill(small_network(), seed=3)
    if not split:
        reference.load_weights(path)
        assert_equal(loaded, reference)
    assert report.loaded == report.total == len(source.weights)


def thin_backbone(name: str, size: int) -> keras.Model:
    """InceptionV3 or ConvNeXtTiny, with all of their layers and few channels."""
    convolution = inception_v3.conv2d_bn

    def thin(inputs: keras.KerasTensor, filters: int, *shape: Any, **options: Any) -> Any:
        return convolution(inputs, filters // 16, *shape, **options)

    dimensions = {"tiny": {**convnext.MODEL_CONFIGS["tiny"], "projection_dims": [4, 8, 12, 16]}}
    with (
        mock.patch.object(inception_v3, "conv2d_bn", thin),
        mock.patch.object(convnext, "MODEL_CONFIGS", dimensions),
    ):
        return build_backbone(BACKBONES[name], size, None)


@pytest.mark.parametrize("name", ["InceptionV3", "ConvNeXtTiny"])
def test_networks_with_generated_names_or_nested_models(name: str, tmp_path: Path) -> None:
    size = BACKBONES[name].minimum_size
    source = thin_backbone(name, size)
    random = np.random.default_rng(0)
    for variable in source.weights:
        variable.assign(random.uniform(0, 1, variable.shape))
    images = keras.Input((size, size, 3))
    nested = keras.Model(images, layers.GlobalAveragePooling2D()(source(images)))
    loaded = thin_backbone(name, size)
    for path in (tmp_path / "nested.h5", tmp_path / "nested.keras"):
        nested.save(path)
        for variable in loaded.weights:
            variable.assign(np.zeros(variable.shape))
        load_weights(loaded, str(path))
        assert_equal(loaded, source)


def test_bfloat16_and_float16_values(tmp_path: Path) -> None:
    source = fill(small_network(), seed=1)
    path = tmp_path / "half.weights.h5"
    source.save_weights(path)
    with h5py.File(path, "a") as file:
        rewritten = {"layers/conv2d/vars/0": ml_dtypes.bfloat16, "layers/conv2d_1/vars/0": "f2"}
        for name, dtype in rewritten.items():
            value = file[name][()].astype(dtype)
            del file[name]
            file[name] = value
        file["layers/conv2d/vars/0"].attrs["dtype"] = "bfloat16"
    loaded = fill(small_network(), seed=2)
    load_weights(loaded, str(path))
    for mine, original in zip(loaded.weights, source.weights, strict=True):
        np.testing.assert_allclose(mine.numpy(), original.numpy(), rtol=1e-2)
        assert mine.dtype == original.dtype


@pytest.mark.skipif(not REAL_WEIGHTS.exists(), reason=f"no real weights at {REAL_WEIGHTS}")
def test_real_weights_load_as_in_keras() -> None:
    model = build_backbone(BACKBONES["MobileNetV2"], 160, None)
    report = load_weights(model, str(REAL_WEIGHTS))
    assert str(report) == (
        "loaded 260 of 260 variables from mobilenet_v2_160_dogs_notop.weights.h5"
    )
    reference = build_backbone(BACKBONES["MobileNetV2"], 160, None)
    reference.load_weights(REAL_WEIGHTS)
    assert_equal(model, reference)


def test_report_in_one_line() -> None:
    report = LoadReport("/some/folder/cats.keras", loaded=260, total=260, left_out=2)
    assert str(report) == "loaded 260 of 260 variables from cats.keras, ignored 2 others in it"


@pytest.fixture
def weights_file(tmp_path: Path) -> Path:
    """A file with the weights of `small_network`."""
    path = tmp_path / "file.weights.h5"
    fill(small_network(), seed=1).save_weights(path)
    return path


def refused(path: Path, model: keras.Model | None = None) -> str:
    """Returns the error message for a file, after checking that no variable has changed."""
    model = fill(model or small_network(), seed=2)
    before = values(model)
    with pytest.raises(UserError) as caught:
        load_weights(model, str(path))
    for value, kept in zip(values(model), before, strict=True):
        np.testing.assert_array_equal(value, kept)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize("ending", ["weights.h5", "keras", "h5"])
@pytest.mark.parametrize("saved", [lambda backbone: backbone, nested_classifier])
def test_a_wrong_shape_is_reported_with_the_layer_and_both_shapes(
    saved: Callable[[keras.Model], keras.Model], ending: str, tmp_path: Path
) -> None:
    path = tmp_path / f"wide.{ending}"
    model = saved(fill(small_network(width=6), seed=1))
    save(model, path)
    assert refused(path) == (
        f"weights file {path} does not fit: layer 'second_conv' needs pointwise_kernel "
        "(1, 1, 4, 4), the file has (1, 1, 4, 6); give a file of the same backbone, or "
        "--weights=none"
    )


def chain(names: str, frozen: str = "") -> keras.Model:
    """A network of layers that all fit each other, named by letters."""
    outputs = inputs = keras.Input((8, 8, 4))
    for name in names:
        outputs = layers.Conv2D(4, 1, name=name, trainable=name not in frozen)(outputs)
    return keras.Model(inputs, outputs)


def whole(model: keras.Model) -> keras.Model:
    return model


def nested(model: keras.Model) -> keras.Model:
    inputs = keras.Input((8, 8, 4))
    return keras.Model(inputs, layers.Dense(2)(layers.GlobalMaxPooling2D()(model(inputs))))


@pytest.mark.parametrize("wrapped", [whole, nested])
@pytest.mark.parametrize("frozen", ["", "abx", "bc", "c", "abc"])
@pytest.mark.parametrize(
    ("stored", "gap"),
    [("abc", ""), ("xabc", ""), ("abcxy", ""), ("axbc", "x"), ("abxyc", "x"), ("wabxcy", "x")],
)
def test_what_is_left_out_stands_before_or_after_what_is_used(
    stored: str,
    gap: str,
    frozen: str,
    wrapped: Callable[[keras.Model], keras.Model],
    tmp_path: Path,
) -> None:
    """Keras 2 lists the frozen layers of a nested model after its other layers."""
    path = tmp_path / "chain.h5"
    source = chain(stored, frozen)
    wrapped(source).save(path)
    model = chain("abc")
    if gap:
        with pytest.raises(UserError, match=f"it has the layer '{gap}' between layers of this"):
            load_weights(model, str(path))
    else:
        load_weights(model, str(path))
        for name in "abc":
            np.testing.assert_array_equal(
                model.get_layer(name).kernel, source.get_layer(name).kernel
            )


def test_a_backbone_does_not_load_a_larger_or_smaller_sibling(tmp_path: Path) -> None:
    """`python -m tests.reliability.similar_backbones` checks the whole table."""
    assert check_group([BACKBONES["VGG16"], BACKBONES["VGG19"]], tmp_path) == (2, [])


def test_last_layer_of_another_shape_changes_nothing(weights_file: Path) -> None:
    with h5py.File(weights_file, "a") as file:
        del file["layers/conv2d_1/vars/1"]
        file["layers/conv2d_1/vars/1"] = np.zeros(7)
    assert "layer 'third_conv' needs bias (4,), the file has (7,)" in refused(weights_file)


def test_missing_layer_and_missing_variable(weights_file: Path) -> None:
    with h5py.File(weights_file, "a") as file:
        del file["layers/conv2d_1/vars/1"]
    assert "layer 'third_conv' needs 2 variables, the file has 1" in refused(weights_file)
    with h5py.File(weights_file, "a") as file:
        del file["layers/conv2d_1"]
    message = f"weights file {weights_file} does not fit: it has no weights for layer 'third_conv'"
    assert message in refused(weights_file)


def test_keras2_file_without_the_last_layer(tmp_path: Path) -> None:
    path = tmp_path / "file.h5"
    write_keras2_notop(fill(small_network(), seed=1), path, split=False)
    with h5py.File(path, "a") as file:
        file.attrs["layer_names"] = file.attrs["layer_names"][:-1]
    assert "it has no weights for layer 'third_conv'" in refused(path)


def test_text_instead_of_numbers(weights_file: Path) -> None:
    with h5py.File(weights_file, "a") as file:
        del file["layers/conv2d_1/vars/1"]
        file["layers/conv2d_1/vars/1"] = np.array([b"a", b"b", b"c", b"d"])
    assert "layer 'third_conv' needs bias (4,) as numbers, the file has type |S1" in refused(
        weights_file
    )


def test_another_backbone(tmp_path: Path) -> None:
    path = tmp_path / "small.weights.h5"
    build_backbone(BACKBONES["SmallResNet"], 32, None).save_weights(path)
    assert "does not fit" in refused(path)


def test_hdf5_without_layers(tmp_path: Path) -> None:
    path = tmp_path / "table.h5"
    with h5py.File(path, "w") as file:
        file["prices"] = np.arange(3)
    assert "it contains no layers of a Keras model" in refused(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.weights.h5"
    assert refused(missing) == (
        f"weights is '{missing}', which does not exist; expected imagenet, none or a file of Keras "
        "weights"
    )
    assert "which is a folder; expected imagenet, none or a file" in refused(tmp_path)


def test_what_is_no_file_of_weights_is_named_with_the_way_out(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "saved_model.pb").write_bytes(b"")
    for ending in ("index", "data-00000-of-00001"):
        (tmp_path / f"step-4.{ending}").write_bytes(b"")
    (tmp_path / "a.weights.json").write_text("{}")
    for name, expected in (
        ("run", "is the folder of a training run; give the file that run_export.py --format=keras"),
        ("step-4", "is a TensorFlow checkpoint; give the file that run_export.py --format=keras"),
        ("step-4.index", "is a TensorFlow checkpoint; give"),
        ("step-4.data-00000-of-00001", "is a TensorFlow checkpoint; give"),
        ("model", "is a SavedModel; save the Keras model that it was made from as FILE.keras"),
        ("a.weights.json", "lists several files; save the weights in one, with save_weights("),
    ):
        assert f"weights is {str(tmp_path / name)!r}, which {expected}" in refused(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"name,price\n1,2\n", b"PK\x03\x04 not an archive"])
def test_another_format(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.weights.h5"
    path.write_bytes(content)
    assert f"weights file {path} cannot be read (" in refused(path)


def test_archive_without_weights(tmp_path: Path) -> None:
    path = tmp_path / "photos.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cat.jpg", b"...")
    assert "is an archive without model.weights.h5" in refused(path)


@pytest.mark.parametrize("ending", ["weights.h5", "keras", "h5"])
@pytest.mark.parametrize("part", [0.05, 0.5, 0.95])
def test_truncated_file(part: float, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"file.{ending}"
    model = fill(small_network(), seed=1)
    save(model, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    assert "cannot be read" in refused(path)


def test_damaged_compressed_archive(tmp_path: Path) -> None:
    fill(small_network(), seed=1).save_weights(tmp_path / "file.weights.h5")
    path = tmp_path / "file.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "file.weights.h5", "model.weights.h5")
    content = bytearray(path.read_bytes())
    content[200:400] = bytes(200)
    path.write_bytes(content)
    assert "cannot be read" in refused(path)


def test_damaged_name(weights_file: Path) -> None:
    content = weights_file.read_bytes()
    weights_file.write_bytes(content.replace(b"separable_conv2d", b"\xff\xfeparable_conv2d"))
    assert "cannot be read" in refused(weights_file)


def test_values_in_another_file(weights_file: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(range(16)))
    with h5py.File(weights_file, "a") as file:
        del file["layers/conv2d_1/vars/1"]
        group = file["layers/conv2d_1/vars"]
        group.create_dataset("1", (4,), "f4", external=[(str(secret), 0, 16)])
    assert "stores 'layers/conv2d_1/vars/1' in another file" in refused(weights_file)


def test_link_to_another_file_is_not_followed(tmp_path: Path) -> None:
    path, other = tmp_path / "file.weights.h5", tmp_path / "other.weights.h5"
    fill(small_network(), seed=1).save_weights(path)
    fill(small_network(), seed=1).save_weights(other)
    with h5py.File(path, "a") as file:
        del file["layers/conv2d_1"]
        file["layers/conv2d_1"] = h5py.ExternalLink(str(other), "layers/conv2d_1")
    assert "it has no weights for layer 'third_conv'" in refused(path)


def test_nothing_in_a_saved_model_is_executed(tmp_path: Path) -> None:
    path = tmp_path / "file.keras"
    source = fill(small_network(), seed=1)
    source.save(path)
    with zipfile.ZipFile(path) as archive:
        weights = archive.read("model.weights.h5")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{'not': 'even JSON'")
        archive.writestr("model.weights.h5", weights)
    loaded = fill(small_network(), seed=2)
    load_weights(loaded, str(path))
    assert_equal(loaded, source)
