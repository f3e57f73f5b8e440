"""The basis of the table of sizes and speeds: counts, the trained part, and what is measured."""

from __future__ import annotations

import dataclasses
import json

import keras
import pytest

from benchmarks import harness
from benchmarks.backbone_cost import (
    batch_for,
    first_of_share,
    measure_all,
    multiply_adds,
    size_for,
    sizes_text,
    table,
)
from benchmarks.harness import describe_machine
from research.models.backbone_table import BACKBONES
from research.models.vision_transformer import build_vision_transformer
from research.system.errors import UserError


def test_products_of_kernels_and_of_tokens_are_counted():
    size, patch, width = 32, 8, 64
    model = build_vision_transformer((size, size, 3), None, "small", width, 2, patch, 64)
    patches, tokens = (size // patch) ** 2, (size // patch) ** 2 + 1
    # Queries, keys and values, their projection, and two layers of four times the width.
    kernels = 12 * width**2
    attention = 2 * tokens * width
    # The class token is a kernel. Resizing the position embeddings once per batch does not count.
    wanted = patches * width * 3 * patch**2 + width + 2 * tokens * (kernels + attention)
    assert sum(map(multiply_adds, model.operations)) == wanted


def test_convolutions_are_counted_at_their_places_and_unknown_products_are_refused():
    images = keras.Input((8, 8, 3))
    maps = keras.layers.Conv2D(4, 3, 2, "same")(images)
    maps = keras.layers.DepthwiseConv2D(3, padding="same")(maps)
    inner = keras.Sequential([keras.layers.LayerNormalization(), keras.layers.Conv2D(2, 1)])
    model = keras.Model(images, inner(maps))
    costs = [multiply_adds(operation) for operation in model.operations]
    assert costs == [0, 16 * 27 * 4, 16 * 9 * 4, 16 * 4 * 2]
    # The last two layers have 704 of 2,432.
    assert [first_of_share(model, share) for share in (0.01, 0.05, 0.06, 0.28, 0.3)] == [
        3,
        3,
        2,
        2,
        1,
    ]
    tokens = keras.Input((5, 8))
    attention = keras.layers.MultiHeadAttention(2, 4)(tokens, tokens)
    with pytest.raises(ValueError, match=r"of class MultiHeadAttention, are not known"):
        multiply_adds(keras.Model(tokens, attention))


@pytest.mark.parametrize(
    ("name", "size", "text"),
    [
        ("VGG16", 160, "from 32"),
        ("DINOv2Small", 154, "multiples of 14, from 28"),
        ("ViTTiny", 160, "multiples of 16, from 32"),
    ],
)
def test_image_sizes(name, size, text):
    backbone = BACKBONES[name]
    assert (size_for(backbone), sizes_text(backbone)) == (size, text)
    backbone.check_size(size)
    assert size_for(dataclasses.replace(backbone, minimum_size=331, patch=1)) == 331


def test_large_networks_have_small_batches():
    assert [batch_for(operations) for operations in (0, 5e8, 1.1e9, 4e9, 1e12)] == [32, 32, 8, 4, 4]


def row_of(name: str, reference: float, uncached: float | None) -> dict:
    speeds = uncached and {"reference": reference, "uncached": uncached, "cached": 2 * uncached}
    sizes = {"image_size": 160, "image_sizes": "from 32"}
    return {"backbone": name, "parameters": 2e6, "multiply_adds": 3e8, **sizes, "speeds": speeds}


def test_speeds_in_the_table_do_not_depend_on_other_load_on_the_machine():
    rows = [row_of("A", 50.0, 0.5), row_of("B", 100.0, 0.5), row_of("C", 100.0, None)]
    lines = table(rows).splitlines()
    assert lines[2:] == [
        "| `A` | 2.0 | 0.30 | 160 | from 32 | 37.5 | 75 |",
        "| `B` | 2.0 | 0.30 | 160 | from 32 | 37.5 | 75 |",
        "| `C` | 2.0 | 0.30 | 160 | from 32 | too slow | too slow |",
    ]
    assert len({line.count("|") for line in lines}) == 1


def test_only_what_is_not_on_file_is_measured_and_other_machines_are_not_mixed(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    file = tmp_path / "backbone_cost.json"
    result = {**describe_machine(), "rows": [{**row_of("VGG16", 1.0, 1.0), "seconds": 9.0}]}
    file.write_text(json.dumps(result))
    assert measure_all(["VGG16"]) == []
    assert "0 backbones, about 0 minutes" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"backbone is 'VGG15'.*nearest: VGG1"):
        measure_all(["VGG15"])
    file.write_text(json.dumps({**result, "processor": "another"}))
    with pytest.raises(UserError, match=r"the processor of .*: another; here: .*; remove the file"):
        measure_all(["VGG16"])
