"""The built-in drawings: deterministic, balanced, and distinguished only by shape."""

from __future__ import annotations

import hashlib
import io
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw

from research.data.built_in import drawing, sketches

DRAWINGS = 400  # half of them to fit a classifier, half to test it


@pytest.fixture(scope="module")
def drawings() -> tuple[np.ndarray, list[bytes]]:
    """Labels, shape (DRAWINGS,), alternating between the classes, and the JPEG files."""
    labels = np.arange(DRAWINGS) % 2
    return labels, [sketches.sketch_jpeg(int(labels[i]), i // 2) for i in range(DRAWINGS)]


def _decode(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)), dtype=np.float64)


def _held_out_accuracy(features: np.ndarray, labels: np.ndarray, ridge: float) -> float:
    """Fits a linear discriminant on the first half; returns its accuracy on the second half."""
    half = len(labels) // 2
    features = (features - features[:half].mean(axis=0)) / features[:half].std(axis=0)
    features = np.concatenate([features, np.ones((len(labels), 1))], axis=1)
    fitted, targets = features[:half], 2.0 * labels[:half] - 1
    covariance = fitted.T @ fitted + ridge * np.eye(fitted.shape[1])
    weights = np.linalg.solve(covariance, fitted.T @ targets)
    return float(np.mean((features[half:] @ weights > 0) == (labels[half:] == 1)))


def test_same_seed_gives_the_same_bytes() -> None:
    assert sketches.sketch_jpeg(0, 3) == sketches.sketch_jpeg(0, 3)
    drawn = [sketches.draw_sketch(1, np.random.default_rng(5)).tobytes() for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_every_drawing_is_different(drawings: tuple[np.ndarray, list[bytes]]) -> None:
    assert len({hashlib.sha256(jpeg).digest() for jpeg in drawings[1]}) == DRAWINGS


def _ink_above_head(label: int, seed: int) -> int:
    """Counts painted pixels higher than 1.15 head radii above the centre of an upright head."""
    rng = np.random.default_rng(seed)
    canvas = Image.new("RGB", (200, 200), "white")
    draw = ImageDraw.Draw(canvas, "RGBA")
    pen = drawing.Pen(draw, (100, 100), unit=50, angle=0, mirror=1, line_width=2)
    coat = drawing.choose_coat(rng)
    (sketches._draw_cat_head, sketches._draw_dog_head)[label](pen, coat, rng)
    above = np.asarray(canvas)[: round(100 - 1.15 * 50)]
    return int((above < 255).any(axis=-1).sum())


@pytest.mark.parametrize("seed", range(20))
def test_only_ears_of_cats_are_above_the_head(seed: int) -> None:
    assert _ink_above_head(0, seed) > 20
    assert _ink_above_head(1, seed) == 0


def test_the_label_does_not_change_the_size() -> None:
    for seed in range(5):
        cat, dog = (sketches.draw_sketch(label, np.random.default_rng(seed)) for label in (0, 1))
        assert cat.mode == dog.mode == "RGB"
        assert cat.size == dog.size
        assert cat.tobytes() != dog.tobytes()


def test_sizes_vary_within_the_documented_ranges(drawings: tuple[np.ndarray, list[bytes]]) -> None:
    sizes = np.asarray([Image.open(io.BytesIO(jpeg)).size for jpeg in drawings[1]])
    shorter, longer = sizes.min(axis=1), sizes.max(axis=1)
    assert shorter.min() >= 96
    assert shorter.max() <= 220
    assert np.ptp(shorter) > 100
    assert (longer / shorter).max() <= 4 / 3
    portrait = np.mean(sizes[:, 0] < sizes[:, 1])
    assert 0.4 < portrait < 0.6


def test_colours_and_sizes_do_not_distinguish_the_classes(
    drawings: tuple[np.ndarray, list[bytes]],
) -> None:
    labels, jpegs = drawings
    rows = []
    for jpeg in jpegs:
        pixels = _decode(jpeg)
        height, width, _ = pixels.shape
        rows.append([*pixels.mean(axis=(0, 1)), *pixels.std(axis=(0, 1)), width, height, len(jpeg)])
    features = np.asarray(rows)
    # A class drawn with more detail would have more bytes per pixel.
    density = features[:, 8] / (features[:, 6] * features[:, 7])
    features = np.concatenate([features, np.log(density)[:, None]], axis=1)
    assert _held_out_accuracy(features, labels, ridge=1.0) < 0.65

    label_as_feature = np.concatenate([features, labels[:, None] + 0.0], axis=1)
    assert _held_out_accuracy(label_as_feature, labels, ridge=1.0) == 1.0  # the classifier works


def test_builder_writes_a_balanced_mixed_train_split(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sketches, "DRAWINGS_PER_CLASS", 20)
    builder = sketches.Sketches(data_dir=tmp_path)
    builder.download_and_prepare()
    assert builder.name == "sketches"
    assert list(builder.info.splits) == ["train"]
    assert builder.info.splits["train"].num_examples == 40
    assert builder.info.supervised_keys == ("image", "label")
    assert builder.info.features["label"].names == ["cat", "dog"]

    examples = list(tfds.as_numpy(builder.as_dataset(split="train")))
    labels = [int(example["label"]) for example in examples]
    assert labels.count(0) == labels.count(1) == 20
    assert len(set(labels[:12])) == 2  # the classes are mixed
    for example in examples:
        class_name, index, _ = example["image/filename"].decode().split(".")
        assert class_name == ["cat", "dog"][example["label"]]
        jpeg = sketches.sketch_jpeg(int(example["label"]), int(index))
        assert example["image"].dtype == np.uint8
        # Decoders may round differently.
        assert np.abs(example["image"] - _decode(jpeg)).mean() < 2


def test_there_are_two_thousand_drawings() -> None:
    assert sketches.DRAWINGS_PER_CLASS == 1_000
    assert sketches.CLASS_NAMES == ("cat", "dog")
