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
    documented = {"article", "default", "fast", "best", "hyperrule", "fastai", "timm"}
    assert documented | {"sketches", "digits"} <= names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_is_valid_and_begins_with_a_comment(path: Path):
    assert settings(path.stem).epochs >= 1
    assert path.read_text().startswith("# ")


def test_the_default_recipe_equals_the_defaults():
    assert settings("default") == TrainConfig()
    lines = (ROOT / "recipes" / "default.flags").read_text().splitlines()
    assert len([line for line in lines if line.startswith("--")]) >= 10


@pytest.mark.parametrize("recipe", ["article", "fastai", "timm"])
def test_recipes_of_others_set_every_flag_of_the_default(recipe):
    """A new default must not change them."""
    own, default = (
        {
            line.lstrip("-").removeprefix("no").partition("=")[0]
            for line in (ROOT / "recipes" / f"{name}.flags").read_text().splitlines()
            if line.startswith("--")
        }
        for name in (recipe, "default")
    )
    # With --head_epochs=0, the head has one learning rate.
    assert default - own <= ({"tuned_head_learning_rate"} if recipe == "timm" else set())


def test_the_article_has_the_settings_of_the_article():
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


def test_fastai_has_the_defaults_of_fine_tune():
    found = settings("fastai")
    base_rate = 2e-3
    assert (found.head_epochs, found.head_learning_rate) == (1, base_rate)
    assert found.tuned_head_learning_rate == base_rate / 2
    assert found.backbone_learning_rate * found.stage_decay**4 == pytest.approx(1e-5, rel=0.02)
    assert found.batch_size * found.accumulate_steps == 64
    assert (found.head_optimizer, found.backbone_optimizer, found.weight_decay) == (
        "adam",
        "adam",
        0.01,
    )
    assert found.head_schedule == found.backbone_schedule == "one_cycle"
    assert found.unfreeze_from == "0"
    assert not make_augmentation(found)


def test_timm_has_the_defaults_of_its_training_script():
    found = settings("timm")
    batch = found.batch_size * found.accumulate_steps
    assert batch == 128
    rate = pytest.approx(0.1 * batch / 256)
    assert found.head_learning_rate == found.backbone_learning_rate == rate
    assert (found.head_optimizer, found.backbone_optimizer, found.momentum) == ("sgd", "sgd", 0.9)
    assert 2 * found.l2_penalty == pytest.approx(2e-5)
    assert (found.warmup, found.label_smoothing) == ("5epochs", 0.1)
    assert [one.name for one in make_augmentation(found).steps] == [
        "random_crop_area",
        "horizontal_flip",
        "colour_jitter",
    ]


def test_recipes_name_no_photos_or_weights():
    for path in RECIPES:
        if path.stem not in ("sketches", "digits"):  # these use built-in data
            for name in ("dataset", "image_folder", "data_dir", "weights", "ckpt_dir", "backbone"):
                default = getattr(TrainConfig(), name)
                assert getattr(settings(path.stem), name) == default, (path.stem, name)
