"""The flagfiles in recipes/: each is a valid configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from flags.command_line import parse_config
from research.loop.builder import make_augmentation
from research.settings.train_config import TrainConfig
from tests.helpers import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.flags"))


def settings(recipe: str) -> TrainConfig:
    return parse_config(TrainConfig, [f"--flagfile={ROOT / 'recipes' / recipe}.flags"])


def test_the_documented_recipes_exist():
    names = {path.stem for path in RECIPES}
    assert {"article", "default", "fast", "best", "hyperrule", "sketches", "digits"} <= names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_is_valid_and_begins_with_a_comment(path: Path):
    assert settings(path.stem).epochs >= 1
    assert path.read_text().startswith("# ")


def test_the_default_recipe_equals_the_defaults():
    assert settings("default") == TrainConfig()
    lines = (ROOT / "recipes" / "default.flags").read_text().splitlines()
    assert len([line for line in lines if line.startswith("--")]) >= 10


def test_the_article_sets_every_flag_of_the_default():
    """A new default must not change the article's recipe."""
    article, default = (
        {
            line.lstrip("-").removeprefix("no").partition("=")[0]
            for line in (ROOT / "recipes" / f"{name}.flags").read_text().splitlines()
            if line.startswith("--")
        }
        for name in ("article", "default")
    )
    assert default <= article
    found = settings("article")
    assert found.head_optimizer == found.backbone_optimizer == "rmsprop"
    assert found.head_learning_rate == found.backbone_learning_rate == 1e-4
    assert (found.batch_size, found.epochs, found.head_epochs) == (32, 10, 0)
    assert (found.bn_mode, found.warmup) == ("train", "0steps")
    assert found.head_schedule == found.backbone_schedule == "constant"
    assert not found.horizontal_flip
    assert not make_augmentation(found)


def test_the_hyperrule_has_the_settings_of_bit():
    found = settings("hyperrule")
    assert found.hyperrule
    assert found.batch_size * found.accumulate_steps == 512
    assert found.head_learning_rate == found.backbone_learning_rate == 0.003
    assert (found.head_optimizer, found.momentum) == ("sgd", 0.9)


def test_recipes_name_no_photos_or_weights():
    for path in RECIPES:
        if path.stem not in ("sketches", "digits"):  # these use built-in data
            for name in ("dataset", "image_folder", "data_dir", "weights", "ckpt_dir", "backbone"):
                default = getattr(TrainConfig(), name)
                assert getattr(settings(path.stem), name) == default, (path.stem, name)
