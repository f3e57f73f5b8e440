"""Tests of reading safetensors files of timm and Hugging Face, and of refusing all others."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import ml_dtypes
import numpy as np
import pytest
from keras.src.applications import convnext

from benchmarks.harness import RESULTS
from benchmarks.timm_forward import photos, random_state
from research.models.backbone import build_backbone
from research.models.backbone_table import BACKBONES
from research.models.convnext_v2 import build_convnext_v2
from research.models.vision_transformer import build_vision_transformer
from research.models.weights import LoadReport, load_weights
from research.system.errors import UserError
from tests.models.safetensors_files import write_parts, write_safetensors

State = dict[str, np.ndarray]


def state_of(name: str) -> State:
    """The weights of a small network of timm, under its names."""
    tensors = json.loads((RESULTS / "timm_reference.json").read_text())["small_networks"][name]
    shapes = {key: tuple(map(int, text.split())) for key, text in tensors["tensors"].items()}
    return random_state(shapes)


def features_of(name: str, size: int) -> np.ndarray:
    """The features that timm computed for this network, in one row."""
    networks = json.loads((RESULTS / "timm_reference.json").read_text())["small_networks"]
    return np.array(networks[name]["features"][str(size)].split(), np.float32)


def small_vit(**changes: Any) -> keras.Model:
    options = {"width": 128, "depth": 2, "patch": 8, "trained_size": 24, **changes}
    return build_vision_transformer((24, 24, 3), None, "small", **options)


def small_dinov2() -> keras.Model:
    return build_vision_transformer((21, 21, 3), None, "small", 64, 2, 7, 35, 4, 0.1, True)


def small_convnext(size: int = 32) -> keras.Model:
    """ConvNeXtTiny with few channels."""
    dimensions = {"tiny": {**convnext.MODEL_CONFIGS["tiny"], "projection_dims": [4, 8, 12, 16]}}
    with mock.patch.object(convnext, "MODEL_CONFIGS", dimensions):
        return build_backbone(BACKBONES["ConvNeXtTiny"], size, None)


# From names of timm to those of Hugging Face: written down from transformers' own modules.
TO_HUGGING_FACE = {
    "small_vit": {
        r"cls_token": "vit.embeddings.cls_token",
        r"pos_embed": "vit.embeddings.position_embeddings",
        r"patch_embed\.proj\.(.*)": r"vit.embeddings.patch_embeddings.projection.\1",
        r"blocks\.(\d)\.norm1\.(.*)": r"vit.encoder.layer.\1.layernorm_before.\2",
        r"blocks\.(\d)\.norm2\.(.*)": r"vit.encoder.layer.\1.layernorm_after.\2",
        r"blocks\.(\d)\.attn\.(query|key|value)\.(.*)": (
            r"vit.encoder.layer.\1.attention.attention.\2.\3"
        ),
        r"blocks\.(\d)\.attn\.proj\.(.*)": r"vit.encoder.layer.\1.attention.output.dense.\2",
        r"blocks\.(\d)\.mlp\.fc1\.(.*)": r"vit.encoder.layer.\1.intermediate.dense.\2",
        r"blocks\.(\d)\.mlp\.fc2\.(.*)": r"vit.encoder.layer.\1.output.dense.\2",
        r"norm\.(.*)": r"vit.layernorm.\1",
    },
    "small_dinov2": {
        r"cls_token": "embeddings.cls_token",
        r"reg_token": "embeddings.register_tokens",
        r"pos_embed": "embeddings.position_embeddings",
        r"patch_embed\.proj\.(.*)": r"embeddings.patch_embeddings.projection.\1",
        r"blocks\.(\d)\.(norm\d\..*|mlp\.fc\d\..*)": r"encoder.layer.\1.\2",
        r"blocks\.(\d)\.ls(\d)\.gamma": r"encoder.layer.\1.layer_scale\2.lambda1",
        r"blocks\.(\d)\.attn\.(query|key|value)\.(.*)": (
            r"encoder.layer.\1.attention.attention.\2.\3"
        ),
        r"blocks\.(\d)\.attn\.proj\.(.*)": r"encoder.layer.\1.attention.output.dense.\2",
        r"norm\.(.*)": r"layernorm.\1",
    },
    "small_convnext": {
        r"stem\.0\.(.*)": r"convnext.embeddings.patch_embeddings.\1",
        r"stem\.1\.(.*)": r"convnext.embeddings.layernorm.\1",
        r"stages\.(\d)\.downsample\.(.*)": r"convnext.encoder.stages.\1.downsampling_layer.\2",
        r"stages\.(\d)\.blocks\.(\d)\.gamma": (
            r"convnext.encoder.stages.\1.layers.\2.layer_scale_parameter"
        ),
        r"stages\.(\d)\.blocks\.(\d)\.conv_dw\.(.*)": (
            r"convnext.encoder.stages.\1.layers.\2.dwconv.\3"
        ),
        r"stages\.(\d)\.blocks\.(\d)\.norm\.(.*)": (
            r"convnext.encoder.stages.\1.layers.\2.layernorm.\3"
        ),
        r"stages\.(\d)\.blocks\.(\d)\.mlp\.fc(\d)\.(.*)": (
            r"convnext.encoder.stages.\1.layers.\2.pwconv\3.\4"
        ),
        r"head\.norm\.(.*)": r"convnext.layernorm.\1",
    },
}
TO_HUGGING_FACE["small_convnext_v2"] = {
    name: new.replace("convnext.", "convnextv2.")
    for name, new in TO_HUGGING_FACE["small_convnext"].items()
    if "gamma" not in name
} | {
    r"stages\.(\d)\.blocks\.(\d)\.mlp\.grn\.(.*)": (
        r"convnextv2.encoder.stages.\1.layers.\2.grn.\3"
    )
}
MODELS: dict[str, Callable[[], keras.Model]] = {
    "small_vit": small_vit,
    "small_dinov2": small_dinov2,
    "small_convnext": small_convnext,
    "small_convnext_v2": lambda: build_convnext_v2(
        (32, 32, 3), None, "small", (1, 1, 2, 1), (8, 16, 24, 32)
    ),
}


def to_hugging_face(state: State, names: Mapping[str, str]) -> State:
    renamed: State = {}
    for name, value in state.items():
        pieces = {name: value}
        if ".qkv." in name:
            thirds = np.split(value, 3)
            kinds = ("query", "key", "value")
            pieces = {name.replace("qkv", k): v for k, v in zip(kinds, thirds, strict=True)}
        for old, piece in pieces.items():
            if ".grn." in old:
                piece = piece.reshape(1, 1, 1, -1)
            if ".mlp.fc" in old and piece.ndim == 4:  # timm has convolutions of 1 x 1 pixels
                piece = piece[:, :, 0, 0]
            (pattern,) = [pattern for pattern in names if re.fullmatch(pattern, old)]
            renamed[re.sub(pattern, names[pattern], old)] = piece
    return renamed


@pytest.mark.parametrize("name", MODELS)
def test_names_of_hugging_face_give_the_same_weights_as_those_of_timm(name, tmp_path):
    state, path = state_of(name), tmp_path / "timm.safetensors"
    write_safetensors(path, {**state, "head.fc.weight": np.zeros((5, 3))})
    of_timm, of_hugging_face = MODELS[name](), MODELS[name]()
    report = load_weights(of_timm, str(path))
    total = len(of_timm.weights)
    assert report == LoadReport(str(path), loaded=total, total=total, left_out=1)
    other = tmp_path / "hugging_face.safetensors"
    write_safetensors(other, to_hugging_face(state, TO_HUGGING_FACE[name]))
    assert load_weights(of_hugging_face, str(other)).left_out == 0
    for one, same in zip(of_timm.weights, of_hugging_face.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), same.numpy())


@pytest.mark.parametrize("size", [32, 64])
def test_convnext_has_the_features_of_timm(size, tmp_path):
    wanted = features_of("small_convnext", size)
    path, model = tmp_path / "timm.safetensors", small_convnext(size)
    write_safetensors(path, state_of("small_convnext"))
    load_weights(model, str(path))
    found = model(photos(size)).numpy().ravel()
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float16", 1e-3), (ml_dtypes.bfloat16, 1e-2), ("float64", 0.0)]
)
def test_other_types_are_converted(dtype, tolerance, tmp_path):
    state, path, model = state_of("small_vit"), tmp_path / "file", small_vit()
    write_safetensors(path, {name: value.astype(dtype) for name, value in state.items()})
    load_weights(model, str(path))
    kernel = model.get_layer("block1_fc2").kernel.numpy()
    assert kernel == pytest.approx(state["blocks.1.mlp.fc2.weight"].T, rel=tolerance, abs=1e-6)


def refused(path: Path, model: keras.Model) -> str:
    """Returns the error message for a file, after checking that no variable has changed."""
    before = model.get_weights()
    with pytest.raises(UserError) as caught:
        load_weights(model, str(path))
    for value, kept in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, kept)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def without(state: State, *names: str) -> State:
    return {name: value for name, value in state.items() if name not in names}


VIT = "; it looks like a vision transformer of 2 blocks of width 128, for patches of 8 pixels"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda state: without(state, "blocks.1.attn.proj.bias"),
            f"it has no 'blocks.1.attn.proj.bias' for layer 'block1_proj'{VIT}",
        ),
        (
            lambda state: {**state, "blocks.2.norm1.weight": np.ones(128)},
            f"it has 'blocks.2.norm1.weight', which this backbone does not have{VIT}",
        ),
        (
            lambda state: {**state, "dist_token": np.ones((1, 1, 128))},
            f"it has 'dist_token', which this backbone does not have{VIT}, distilled",
        ),
        (
            lambda state: {**state, "blocks.0.ls1.gamma": np.ones(128)},
            f"it has 'blocks.0.ls1.gamma', which this backbone does not have{VIT}, with scaled "
            "branches",
        ),
        (
            lambda state: {**state, "blocks.0.mlp.fc1.weight": np.ones((512, 127))},
            "layer 'block0_fc1' needs kernel (128, 512), the file has (127, 512)" + VIT,
        ),
        (
            lambda state: {**state, "pos_embed": np.ones((1, 17, 128))},
            "layer 'position_embedding' needs kernel (9, 128), the file has (16, 128)" + VIT,
        ),
        (
            lambda state: {**state, "norm.weight": np.ones(128, np.int64)},
            f"'norm.weight' is stored as int64, not as floats{VIT}",
        ),
        (
            lambda _: {"layer1.0.conv1.weight": np.ones(3)},
            "it has no 'patch_embed.proj.weight' for layer 'patches'; it looks like a ResNet of "
            "PyTorch, whose strides differ from Keras's",
        ),
        (
            lambda _: {"stages.0.blocks.0.conv_dw.weight": np.ones(3)},
            "it has no 'patch_embed.proj.weight' for layer 'patches'; it looks like a ConvNeXt of "
            "1, 0, 0, 0 blocks",
        ),
        (lambda _: {}, "it has no 'patch_embed.proj.weight' for layer 'patches'"),
    ],
)
def test_a_file_that_does_not_fit_is_described(change, problem, tmp_path):
    path = tmp_path / "file.safetensors"
    write_safetensors(path, change(state_of("small_vit")))
    assert refused(path, small_vit()) == (
        f"weights file {path} does not fit: {problem}; give a file of the same backbone, or "
        "--weights=none"
    )


def test_a_backbone_that_has_no_names_in_pytorch(tmp_path):
    path = tmp_path / "file.safetensors"
    write_safetensors(path, {"layer1.0.conv1.weight": np.ones(3, np.float32)})
    message = refused(path, build_backbone(BACKBONES["SmallResNet"], 32, None))
    assert (
        "does not fit: safetensors files are only read for vision transformers, ConvNeXt and "
        "MobileNetV4; it looks like a ResNet of PyTorch, whose strides differ from Keras's"
    ) in message


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_are_finite(value, tmp_path):
    state, path = state_of("small_vit"), tmp_path / "file.safetensors"
    state["blocks.1.mlp.fc2.bias"][3] = value
    write_safetensors(path, state)
    assert "block1_fc2/bias contains a value that is not a finite float32" in refused(
        path, small_vit()
    )


def entry(begin: Any, end: Any, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"a": entry(0, 4), "b": entry(0, 4)}, "its tensors overlap or leave gaps"),
        ({"a": entry(4, 8)}, "its tensors overlap or leave gaps"),
        ({"a": entry(0, 4)}, "it has bytes after the last tensor"),
        ({"a": entry(0, 12, [3])}, "the place of 'a' does not fit its shape or the file"),
        ({"a": entry(0, 8, [3])}, "the place of 'a' does not fit its shape or the file"),
        ({"a": entry(8, 0, [-2])}, "'a' has a shape or place that is not a list of sizes"),
        ({"a": entry(0, 8, [2.0])}, "'a' has a shape or place that is not a list of sizes"),
        ({"a": entry(0, True)}, "'a' has a shape or place that is not a list of sizes"),
        ({"a": entry(0, 8, [2**70, 2**70])}, "the place of 'a' does not fit its shape"),
        ({"a": entry(0, 8, [1] * 9, "F64")}, "the entry of 'a' is not valid"),
        ({"a": entry(0, 8, [2], "F8_E4M3")}, "'a' has the unknown type 'F8_E4M3'"),
        ({"a": entry(0, 8, [2], ["F32"])}, "'a' has the unknown type"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "the entry of 'a' is not complete"),
        ({"a": 3}, "the entry of 'a' is not complete"),
        ('{"a": 1, "a": 2}', "a name occurs twice in its header"),
        ("{", "Expecting property name"),
        ('{"a": ' + "[" * 100_000 + "}", "maximum recursion depth"),
        ("{\xff}", "Expecting property name"),
    ],
)
def test_a_damaged_header_is_refused(header, reason, tmp_path):
    path = tmp_path / "file.safetensors"
    write_parts(path, header if isinstance(header, str) else json.dumps(header), bytes(8))
    message = refused(path, small_vit(depth=1))
    assert message.startswith(f"weights file {path} cannot be read ({reason}")
    assert message.endswith("expected a safetensors file: it may be truncated or damaged")


@pytest.mark.parametrize("kept", [9, 100, 5_000, -1])
def test_a_truncated_file_is_refused(kept, tmp_path):
    path = tmp_path / "file.safetensors"
    write_safetensors(path, state_of("small_vit"))
    path.write_bytes(path.read_bytes()[:kept])
    assert "cannot be read" in refused(path, small_vit())
