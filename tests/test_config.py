from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from pathlib import Path

import pytest

from research.runs.console import short_path
from research.settings.durations import parse_steps
from research.settings.fields import setting_of
from research.settings.program_configs import EvalConfig
from research.settings.train_config import TrainConfig
from research.system.errors import UserError


def test_json_round_trip_keeps_every_setting():
    config = TrainConfig(
        backbone="VGG16", epochs=3, head_learning_rate=0.02, steps_per_epoch=7, deterministic=True
    )
    assert TrainConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("epochs", -1, "epochs is -1; expected an integer of at least 0"),
        ("batch_size", 0, "batch_size is 0; expected an integer of at least 1"),
        ("head_learning_rate", 0.0, "expected a number greater than 0"),
        ("head_learning_rate", float("nan"), "head_learning_rate is nan"),
        ("backbone_learning_rate", float("inf"), "backbone_learning_rate is inf"),
        ("bn_mode", "thawed", "expected one of: frozen, train, sync"),
        ("head_optimizer", "adamm", "expected one of: sgd, rmsprop, adam, adamw, lion"),
        ("backbone", "ResNet101V3", "ResNet101V2"),
        ("epochs", "3", "expected a value of type int"),
        ("dataset", "", "expected non-empty text"),
        ("seed", 2**31, "seed is 2147483648; expected an integer of at most 2147483647"),
        ("batch_size", 10**400, "of at most 65536"),
        ("image_size", 100_000, "of at most 4096"),
        ("weights", "https://a.b/c.h5", "'https://a.b/c.h5', which is a URL; download the file"),
    ],
)
def test_an_error_names_the_value_and_what_was_expected(setting, value, expected):
    with pytest.raises(UserError) as error:
        TrainConfig(**{setting: value})
    assert setting in str(error.value)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_an_image_size_below_the_minimum_of_the_backbone_is_refused():
    with pytest.raises(UserError, match="image_size is 64; expected at least 75 for InceptionV3"):
        TrainConfig(backbone="InceptionV3", image_size=64)


def test_a_run_without_epochs_is_refused():
    with pytest.raises(UserError, match="at least one epoch"):
        TrainConfig(epochs=0, head_epochs=0)


def test_steps_to_profile():
    assert list(parse_steps("3:5")) == [3, 4, 5]
    assert list(parse_steps(None)) == []


@pytest.mark.parametrize("text", ["5", "5:3", "0:4", "a:b", "1:2:3", "-1:3", ":", "1:99999999999"])
def test_invalid_steps_to_profile_are_refused(text):
    with pytest.raises(UserError, match="expected the first and last step as A:B"):
        TrainConfig(profile_steps=text)


def test_paths_are_made_absolute():
    config = TrainConfig(image_folder="photos", weights="w.weights.h5")
    assert config.image_folder == os.path.abspath("photos")
    assert config.weights == os.path.abspath("w.weights.h5")


def test_differences_contain_only_settings_that_change_the_result():
    one = TrainConfig(epochs=3, ckpt_dir="a", distribution="none")
    other = TrainConfig(epochs=4, ckpt_dir="b", distribution="mirrored")
    assert one.differences(other) == {"epochs": (3, 4)}


def test_runs_from_before_the_setting_resize_were_trained_on_squashed_photos():
    settings = json.loads(TrainConfig(resize="pad").to_json())
    assert TrainConfig.from_json(json.dumps(settings)).resize == "pad"
    del settings["resize"]
    assert TrainConfig.from_json(json.dumps(settings)).resize == "squash"
    del settings["weight_averaging"]  # these runs have no averages in their checkpoints
    assert TrainConfig.from_json(json.dumps(settings)).weight_averaging == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not JSON"),
        ("[]", "not contain a JSON"),
        ('{"epoch": 3}', "does not know: .'epoch'"),
    ],
)
def test_an_invalid_config_file_is_refused(text, expected):
    with pytest.raises(UserError, match=expected):
        TrainConfig.from_json(text)


VALUES = (None, 3, -1, 1.5, math.inf, "x", "", "\n", True, [], [3], ["x"], [[]], {}, {"a": 1})


def test_no_value_in_a_config_file_gives_a_traceback():
    usual = json.loads(TrainConfig().to_json())
    refused = 0
    for name, value in itertools.product(usual, VALUES):
        try:
            TrainConfig.from_json(json.dumps({**usual, name: value}))
        except UserError:
            refused += 1
    assert len(usual) < refused < len(usual) * len(VALUES)


@pytest.mark.parametrize("config_class", [TrainConfig, EvalConfig])
def test_every_setting_has_a_help_text(config_class):
    for field in dataclasses.fields(config_class):
        assert len(setting_of(field).help) > 10, field.name


def test_evaluation_needs_a_run_and_at_most_one_source_of_photos():
    with pytest.raises(UserError, match="ckpt_dir is not given"):
        EvalConfig()
    with pytest.raises(UserError, match="both given"):
        EvalConfig(ckpt_dir="x", dataset="a", image_folder="b")
    assert [Path(one).name for one in EvalConfig(ckpt_dir="run").ckpt_dir] == ["run"]


def test_a_path_without_a_home_or_working_directory_is_refused(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="ckpt_dir is '~nobody_at_all/run', and the home folder"):
        TrainConfig(ckpt_dir="~nobody_at_all/run")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UserError, match="ckpt_dir is 'run', and the working directory no longer"):
        TrainConfig(ckpt_dir="run")
    assert TrainConfig(ckpt_dir="/run").ckpt_dir == short_path("/run") == "/run"
