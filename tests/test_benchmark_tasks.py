"""The tasks of the benchmarks: how a command names them, drawn pictures, and recipes with `fit`."""

from __future__ import annotations

import argparse
import collections
import dataclasses

import keras
import numpy as np
import pytest

from benchmarks import fit_recipes
from benchmarks.drawn_tasks import SIDE, Beetles, Textures, Typefaces
from benchmarks.fit_recipes import ARTICLE, KERAS_IO, TENSORFLOW_ORG, FitPhase, fit, set_trainable
from benchmarks.tasks import DRAWN, DividedSource, Fold, all_photos, divide, parse_tasks
from flags.command_line import parse_config
from research.data.open_source import open_source
from research.data.source import Example
from research.models import residual
from research.models.backbone_table import find_backbone
from research.settings.train_config import TrainConfig


def test_a_command_names_data_sets_folders_and_drawn_tasks(tmp_path):
    names = ["cats_vs_dogs", "digits", "beetles", f"own={tmp_path}"]
    cats, digits, beetles, own = parse_tasks(names, str(tmp_path))
    assert cats.photos == ("--dataset=cats_vs_dogs", f"--data_dir={tmp_path}")
    assert digits.photos == ("--dataset=digits",)  # not prepared in the folder of others
    assert "--nohorizontal_flip" in digits.others
    assert (own.name, own.photos) == ("own", (f"--image_folder={tmp_path}",))
    for task in (cats, digits, beetles, own):
        assert isinstance(parse_config(TrainConfig, [*task.photos, *task.others]), TrainConfig)
    with pytest.raises(argparse.ArgumentTypeError, match=r"'trash=nowhere'.*NAME=FOLDER"):
        parse_tasks(["trash=nowhere"])
    with pytest.raises(argparse.ArgumentTypeError, match="two tasks have the name 'digits'"):
        parse_tasks(["digits", "beetles", "digits"])


@pytest.mark.parametrize("name", DRAWN)
def test_drawn_pictures_are_found_by_the_flag_and_are_always_the_same(name):
    (task,) = parse_tasks([name])
    source = open_source("", source=parse_config(TrainConfig, list(task.photos)).source)
    assert type(source).__name__ in {kind.__name__ for kind in (Beetles, Textures, Typefaces)}
    classes = len(source.class_names)
    assert source.count("train") == 100 * classes
    assert source.count("validation") == source.count("test") == 0
    first, again = (
        [example for example, _ in zip(source.examples("train"), range(2 * classes), strict=False)]
        for _ in range(2)
    )
    assert first == again
    assert [example.label for example in first] == [*range(classes)] * 2
    assert len({example.image for example in first}) == len({one.name for one in first})
    picture = source.draw(0, np.random.default_rng(0))
    assert (picture.mode, picture.size) == ("RGB", (SIDE, SIDE))


def shades(count: int) -> DividedSource:
    """Dark and bright pictures, with some noise."""
    generator = np.random.default_rng(0)
    photos = [
        Example(
            generator.integers(0, 60, (40, 40, 3), np.uint8) + np.uint8(label * 190),
            label,
            f"{index}.png",
        )
        for index in range(count)
        for label in [index % 2]
    ]
    return DividedSource(("dark", "bright"), {"train": photos})


def test_folds_divide_all_photos():
    source = shades(200)
    divided = divide(source, Fold(0, 1, 3))
    counts = collections.Counter({split: divided.count(split) for split in ("train", "test")})
    assert counts["test"] == pytest.approx(67, abs=20)
    names = sorted(photo.name for photo in all_photos(divided))
    assert names == sorted(photo.name for photo in all_photos(source))


def test_phases_of_fit_train_the_layers_of_the_tutorials():
    base = find_backbone("MobileNetV2").build((160, 160, 3), None)

    def trained(phase: FitPhase) -> list[int]:
        set_trainable(base, phase)
        return [index for index, layer in enumerate(base.layers) if layer.trainable_variables]

    assert trained(TENSORFLOW_ORG.phases[0]) == []
    from_100 = trained(TENSORFLOW_ORG.phases[1])
    assert min(from_100) >= 100
    assert from_100 == trained(ARTICLE.phases[0])
    last = trained(KERAS_IO.phases[1])
    assert last and min(last) >= len(base.layers) - 16
    assert not any(isinstance(base.layers[at], keras.layers.BatchNormalization) for at in last)


def test_fit_learns_and_its_predictions_are_those_of_the_test_photos(monkeypatch):
    monkeypatch.setattr(fit_recipes, "IMAGE_SIZE", 32)  # quicker
    monkeypatch.setattr(residual, "BLOCKS_PER_STAGE", 1)
    photos = all_photos(shades(60))
    source = DividedSource(("dark", "bright"), {"train": photos[:40], "test": photos[40:]})
    quick = dataclasses.replace(TENSORFLOW_ORG, phases=(FitPhase("Adam", 3e-2, 3),))
    predictions = fit(quick, "SmallResNet", "none", source, seed=0).predictions("test")
    assert predictions.names == tuple(photo.name for photo in photos[40:])
    assert predictions.labels.tolist() == [photo.label for photo in photos[40:]]
    assert predictions.logits.shape == (20, 2)
    assert predictions.correct.mean() > 0.9
    for mirrored in (True, False):
        model, _ = fit_recipes.build_model(quick, "SmallResNet", "none", 2, mirrored, seed=0)
        flips = [one for one in model.layers if isinstance(one, keras.layers.RandomFlip)]
        assert len(flips) == mirrored
