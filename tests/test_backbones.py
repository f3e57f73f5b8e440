"""Tests of the table of backbones: names, preprocessing, stages and error messages."""

from __future__ import annotations

import bisect
import functools
import re
import socket
import subprocess
import sys
import urllib.error
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.applications import efficientnet
from keras.src.utils import file_utils

from research.models.backbone import (
    Backbone,
    Stage,
    build_backbone,
    first_trainable_layer,
    stage_starts,
)
from research.models.backbone_table import BACKBONES, find_backbone, keras_preprocessing
from research.models.split import crossing_tensors
from research.system.errors import UserError

# The smallest network of each family, with one of its stages and the first layer of that stage.
FAMILIES = {
    "VGG16": ("block4", "block4_conv1"),
    "ResNet50": ("conv4", "conv4_block1_1_conv"),
    "ResNet50V2": ("conv4", "conv4_block1_preact_bn"),
    "Xception": ("block3", "block3_sepconv1_act"),
    "MobileNetV2": ("stage3", "block_3_expand"),
    "MobileNetV3Small": ("stage3", "expanded_conv_3_expand"),
    "MobileNetV3Large": ("stage4", "expanded_conv_6_expand"),
    "DenseNet121": ("conv3", "conv3_block1_0_bn"),
    "EfficientNetB0": ("block4", "block4a_expand_conv"),
    "EfficientNetV2B0": ("top", "top_conv"),
    "EfficientNetV2S": ("block1", "block1a_project_conv"),
    "ConvNeXtTiny": ("stage2", "convnext_tiny_downsampling_block_1"),
    "SmallResNet": ("stage2", "stage2_block1_1_bn"),
    "MobileNet": ("stage4", "conv_pad_6"),
    "ViTTiny": ("block10", "block10_norm1"),
    "DINOv2SmallRegisters": ("block1", "block1_norm1"),
}
# Prefixes of layer names in a block, such as 'stage2_block1_' or 'expanded_conv_3_'.
BLOCK = re.compile(
    r"((?:convnext_tiny_)?stage_?\d_block_?\d|conv\d_block\d+|block\d+[a-z]?|block_\d+"
    r"|conv_[dp]w_\d+|expanded_conv(?:_\d+)?)_"
)
EVERY_FAMILY = [*FAMILIES, "InceptionV3"]

pytestmark = pytest.mark.usefixtures("whole_small_resnet")


@functools.cache
def model_of(name: str) -> keras.Model:
    """Builds a backbone once for all tests, which do not change it."""
    return build_backbone(BACKBONES[name], BACKBONES[name].minimum_size, None)


def test_the_table_has_the_documented_names_and_keras_has_them_too() -> None:
    document = (Path(__file__).resolve().parents[1] / "docs" / "backbones.md").read_text()
    documented = ", ".join(re.findall(r"^\| ([A-Z].+?) \|", document, re.MULTILINE)).split(", ")
    assert sorted(documented) == sorted(BACKBONES)
    assert len(documented) == 76
    assert all(name == backbone.name for name, backbone in BACKBONES.items())
    own = ("SmallResNet", "ViT", "DeiT", "DINOv2", "ConvNeXtV2", "MobileNetV4")
    assert all(hasattr(keras.applications, n) for n in documented if not n.startswith(own))


def test_the_table_imports_neither_tensorflow_nor_keras() -> None:
    code = (
        "import sys, research.models.backbone_table;"
        "print([m for m in ('tensorflow', 'keras', 'h5py', 'numpy') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


MINUS_ONE_TO_ONE = (1.0, -1.0, 0.0)
BLUE_GREEN_RED_LESS_MEAN = (127.5 - 103.939, 0.0 - 116.779, 255.0 - 123.68)
MEAN_AND_DEVIATION = ((1.0 - 0.485) / 0.229, (0.0 - 0.456) / 0.224, (0.5 - 0.406) / 0.225)
UNCHANGED = (255.0, 0.0, 127.5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("VGG16", BLUE_GREEN_RED_LESS_MEAN),
        ("VGG19", BLUE_GREEN_RED_LESS_MEAN),
        ("InceptionV3", MINUS_ONE_TO_ONE),
        ("ResNet101", BLUE_GREEN_RED_LESS_MEAN),
        ("ResNet101V2", MINUS_ONE_TO_ONE),
        ("Xception", MINUS_ONE_TO_ONE),
        ("InceptionResNetV2", MINUS_ONE_TO_ONE),
        ("NASNetLarge", MINUS_ONE_TO_ONE),
        ("MobileNet", MINUS_ONE_TO_ONE),
        ("MobileNetV2", MINUS_ONE_TO_ONE),
        ("MobileNetV3Small", UNCHANGED),
        ("MobileNetV3Large", UNCHANGED),
        ("DenseNet121", MEAN_AND_DEVIATION),
        ("EfficientNetB0", UNCHANGED),
        ("EfficientNetV2B0", UNCHANGED),
        ("EfficientNetV2S", UNCHANGED),
        ("ConvNeXtTiny", UNCHANGED),
        ("SmallResNet", MINUS_ONE_TO_ONE),
        ("ConvNeXtV2Base", MEAN_AND_DEVIATION),
        ("MobileNetV4ConvLarge", MEAN_AND_DEVIATION),
        ("ViTTiny384", MINUS_ONE_TO_ONE),
        ("DeiT3Small", MEAN_AND_DEVIATION),
        ("DINOv2Small", MEAN_AND_DEVIATION),
    ],
)
def test_preprocessing_of_a_known_pixel(name: str, expected: tuple[float, ...]) -> None:
    images = np.tile(np.array([255.0, 0.0, 127.5], np.float32), (2, 3, 4, 1))
    before = images.copy()
    preprocess = BACKBONES[name].preprocessing
    for result in (
        preprocess(images),
        tf.function(preprocess, autograph=False)(tf.constant(images)),
    ):
        assert result.dtype == tf.float32
        assert result.shape == images.shape
        np.testing.assert_allclose(result[1, 2, 3], expected, rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize(
    ("name", "layer", "white"),
    [
        ("MobileNetV3Small", 1, (1.0, 1.0, 1.0)),
        ("EfficientNetB0", 3, (2.2489083, 2.4285714, 2.64)),
        ("EfficientNetV2B0", 2, (2.2489083, 2.4285714, 2.64)),
        ("EfficientNetV2S", 1, (0.9921875, 0.9921875, 0.9921875)),
        ("ConvNeXtTiny", 1, (2.2489083, 2.4285714, 2.64)),
    ],
)
def test_families_without_preprocessing_scale_in_the_model(
    name: str, layer: int, white: tuple[float, ...]
) -> None:
    model = model_of(name)
    scaling = keras.Model(model.input, model.layers[layer].output)
    scaled = scaling(np.full((1, 32, 32, 3), 255.0, np.float32))
    np.testing.assert_allclose(scaled[0, 5, 5], white, rtol=1e-5)


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_stages_start_at_layer_0_and_increase(name: str) -> None:
    starts = list(stage_starts(model_of(name), BACKBONES[name]).values())
    assert starts[0] == 0
    assert starts == sorted(set(starts))
    assert starts[-1] < len(model_of(name).layers)


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_one_tensor_leads_into_each_stage(name: str) -> None:
    model = model_of(name)
    for stage, start in stage_starts(model, BACKBONES[name]).items():
        assert len(crossing_tensors(model, start)) == (1 if start else 0), stage


@pytest.mark.parametrize("name", FAMILIES)
def test_every_block_is_in_one_stage(name: str) -> None:
    names = [layer.name for layer in model_of(name).layers]
    starts = list(stage_starts(model_of(name), BACKBONES[name]).values())
    stages_of_block: dict[str, set[int]] = {}
    for index, layer in enumerate(names):
        if block := BLOCK.match(layer):
            stages_of_block.setdefault(block[1], set()).add(bisect.bisect_right(starts, index))
    assert len(stages_of_block) >= 5
    assert all(len(stages) == 1 for stages in stages_of_block.values()), stages_of_block


@pytest.mark.parametrize("name", FAMILIES)
def test_first_layer_of_a_stage(name: str) -> None:
    stage, first = FAMILIES[name]
    model = model_of(name)
    assert model.layers[stage_starts(model, BACKBONES[name])[stage]].name == first


def test_inception_stages_do_not_depend_on_models_built_before() -> None:
    backbone = BACKBONES["InceptionV3"]
    again = build_backbone(backbone, 75, None)
    assert again.layers[1].name != model_of("InceptionV3").layers[1].name
    starts = stage_starts(again, backbone)
    assert starts == stage_starts(model_of("InceptionV3"), backbone)
    assert list(starts) == ["stem", *(f"mixed{n}" for n in range(11))]
    assert isinstance(again.layers[starts["mixed0"] - 1], keras.layers.MaxPooling2D)
    assert all(again.layers[starts[f"mixed{n}"] - 1].name == f"mixed{n - 1}" for n in range(1, 11))


def test_stage_without_a_matching_layer_is_an_error() -> None:
    entry = BACKBONES["SmallResNet"]
    wrong = Backbone("Wrong", entry.build, entry.preprocessing, (Stage("stem"), Stage("a", "b_")))
    with pytest.raises(UserError, match="stage a of Wrong"):
        stage_starts(model_of("SmallResNet"), wrong)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ResNet101V3", "backbone is 'ResNet101V3'; expected a known backbone, nearest: ResNet101"),
        ("resnet101v2", "expected a known backbone, nearest: ResNet101V2,"),
        ("mobilenet", "nearest: MobileNet,"),
        ("qqqq", "backbone is 'qqqq'; expected VGG16, VGG19, InceptionV3, "),
    ],
)
def test_error_for_an_unknown_backbone_lists_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        find_backbone(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_minimum_size() -> None:
    assert model_of("Xception").input_shape == (None, 71, 71, 3)
    with pytest.raises(UserError, match=r"^image_size is 70; expected at least 71 for Xception$"):
        build_backbone(BACKBONES["Xception"], 70, None)


def fail_downloads(monkeypatch: pytest.MonkeyPatch, home: Path, error: Exception) -> list[object]:
    """Makes every download fail. Returns a list to which each download adds its timeout."""
    timeouts: list[object] = []

    def urlretrieve(url: str, filename: str, hook: object) -> None:
        timeouts.append(socket.getdefaulttimeout())
        raise error

    monkeypatch.setattr(file_utils, "urlretrieve", urlretrieve)
    monkeypatch.setattr(file_utils.config, "keras_home", lambda: str(home))
    return timeouts


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError(OSError(-2, "Name or service not known")),
        urllib.error.HTTPError("https://host/file", 403, "Forbidden", None, None),  # type: ignore
        TimeoutError("timed out\nafter a while"),
    ],
)
def test_failed_download_is_reported_in_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    timeouts = fail_downloads(monkeypatch, tmp_path, error)
    before = socket.getdefaulttimeout()
    with pytest.raises(UserError) as caught:
        build_backbone(BACKBONES["MobileNetV2"], 96, "imagenet")
    message = str(caught.value)
    assert message.startswith("could not download the ImageNet weights of MobileNetV2 (")
    assert message.endswith("; give --weights=FILE, or --weights=none to train from scratch")
    assert "\n" not in message
    assert len(timeouts) == 1 and timeouts[0] is not None
    assert socket.getdefaulttimeout() == before


def test_other_errors_of_a_builder_are_raised_unchanged() -> None:
    def build(input_shape: tuple[int, int, int], weights: str | None) -> keras.Model:
        raise ValueError("a bug in the builder")

    preprocessing = keras_preprocessing("resnet_v2")
    broken = Backbone("Broken", build, preprocessing, (Stage("stem"),), has_imagenet_weights=True)
    with pytest.raises(ValueError, match="a bug in the builder"):
        build_backbone(broken, 32, "imagenet")


def test_efficientnet_is_the_same_network_with_and_without_imagenet_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # One block in each stage.
    blocks = [{**block, "repeats": 1} for block in efficientnet.DEFAULT_BLOCKS_ARGS]
    monkeypatch.setattr(efficientnet, "DEFAULT_BLOCKS_ARGS", blocks)
    scratch = build_backbone(BACKBONES["EfficientNetB0"], 32, None)
    path = tmp_path / "download.weights.h5"
    scratch.save_weights(path)
    monkeypatch.setattr(file_utils, "get_file", lambda *arguments, **options: str(path))
    pretrained = build_backbone(BACKBONES["EfficientNetB0"], 32, "imagenet")
    assert [type(layer) for layer in pretrained.layers] == [type(layer) for layer in scratch.layers]
    images = np.random.default_rng(0).uniform(0, 255, (1, 32, 32, 3)).astype(np.float32)
    np.testing.assert_array_equal(pretrained(images), scratch(images))


@pytest.mark.parametrize(
    ("unfreeze_from", "index"),
    [
        ("0", 0),
        ("17", 17),
        ("49", 49),
        ("none", 49),
        ("stem", 0),
        ("stage2", 17),
        ("stage2_block1_1_bn", 17),
        ("post_relu", 48),
    ],
)
def test_unfreeze_from(unfreeze_from: str, index: int) -> None:
    backbone = BACKBONES["SmallResNet"]
    assert first_trainable_layer(model_of("SmallResNet"), backbone, unfreeze_from) == index


def test_stage_has_priority_over_a_layer_of_the_same_name() -> None:
    model = model_of("InceptionV3")
    index = first_trainable_layer(model, BACKBONES["InceptionV3"], "mixed5")
    assert model.layers[index - 1].name == "mixed4"


@pytest.mark.parametrize(
    ("unfreeze_from", "start", "end"),
    [
        ("400", "unfreeze_from is '400'; SmallResNet has 49 layers: expected 0 to 49", "or none"),
        ("-1", "unfreeze_from is '-1'; SmallResNet", "stem, stage1, stage2, stage3, or none"),
        ("stage4", "unfreeze_from is 'stage4'; ", "; nearest: stage3, stage2, stage1"),
        ("Stage2_Block1_add", "unfreeze_from is 'Stage2_Block1_add'; ", "stage2_block2_add"),
        ("1.5", "unfreeze_from is '1.5'; SmallResNet has 49 layers", "or none"),
        ("", "unfreeze_from is ''; SmallResNet has 49 layers", "or none"),
    ],
)
def test_wrong_unfreeze_from_lists_the_stages(unfreeze_from: str, start: str, end: str) -> None:
    with pytest.raises(UserError) as caught:
        first_trainable_layer(model_of("SmallResNet"), BACKBONES["SmallResNet"], unfreeze_from)
    message = str(caught.value)
    assert message.startswith(start)
    assert message.endswith(end)
    assert "\n" not in message
