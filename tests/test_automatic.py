"""The settings with the value `auto`: the evidence, the rules, and runs that keep their choices."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from research.data.split_arrays import SplitArrays
from research.evaluation import evaluation_size
from research.evaluation.evaluation_size import choose_evaluation_scale
from research.loop.builder import build_network
from research.loop.pilot import left_out_predictions, run_pilot
from research.loop.trunk.frozen_layers import EpochInput
from research.models.backbone import FirstLayers
from research.runs.find_run import find_run
from research.settings.automatic import (
    Choice,
    Evidence,
    automatic_settings,
    choose,
    with_choices,
    without_auto,
)
from research.settings.train_config import TrainConfig
from research.system.errors import UserError
from research.train import train
from tests.helpers import SMALL_CONFIG

LAYERS = FirstLayers("100", "stage4")


def values(config: TrainConfig, photos: int, found: Evidence | str) -> dict[str, object]:
    return {name: one.value for name, one in choose(config, photos, LAYERS, lambda: found).items()}


def test_photos_left_out_are_predicted_as_by_a_regression_on_all_others():
    generator = np.random.default_rng(0)
    labels = np.arange(30) % 3
    views = [generator.random((30, 40)) + np.eye(40)[labels] * 0.7 for _ in range(2)]
    found = left_out_predictions(views, labels, 3)
    scale, expected = np.square(views[0]).sum(axis=1).mean(), {}
    for penalty in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        right, error = [[], []], 0.0
        for photo in range(30):
            others = np.arange(30) != photo
            ridge = Ridge(alpha=penalty * scale, fit_intercept=False)
            ridge.fit(views[0][others], np.eye(3)[labels[others]])
            predicted = ridge.predict(np.stack([view[photo] for view in views]))
            error += np.square(predicted[0] - np.eye(3)[labels[photo]]).sum()
            for view in range(2):
                right[view].append(predicted[view].argmax() == labels[photo])
        expected[error] = right
    np.testing.assert_array_equal(found, expected[min(expected)])
    assert 0.4 < found[0].mean() < 1


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (np.zeros(31, np.int32), "31 photos are too few to tell"),
        (np.full(40, 7, np.int32), "the labels are not one class per photo"),
        (np.zeros(40, np.float32), "the labels are not one class per photo"),
        (np.zeros((40, 3), np.int32), "the labels are not one class per photo"),
    ],
)
def test_some_photos_tell_nothing(labels, reason):
    photos = SplitArrays((np.zeros((len(labels), 8, 8, 3), np.uint8),), labels, ())
    loader = SimpleNamespace(class_names=("a", "b", "c"), examples=lambda split: photos)
    assert run_pilot(None, loader, 0) == reason


def test_what_photos_tell_decides():
    config = TrainConfig()
    hard = values(config, 1_600, Evidence(photos=256, accuracy=0.75, lost=20, won=18))
    assert hard == {
        "unfreeze_from": "stage4",
        "steps_per_epoch": 0,
        "head_epochs": 3,
        "backbone_learning_rate": 1.5e-4,
        "horizontal_flip": True,
        "mirror_averaging": True,
    }
    harder = values(config, 1_600, Evidence(photos=256, accuracy=0.3, lost=20, won=18))
    assert harder["backbone_learning_rate"] == 4.2e-4
    easy = values(config, 1_600, Evidence(photos=256, accuracy=0.99, lost=0, won=0))
    assert (easy["unfreeze_from"], easy["backbone_learning_rate"]) == ("100", 3e-5)
    few = values(config, 200, Evidence(photos=200, accuracy=0.99, lost=0, won=0))
    assert few["backbone_learning_rate"] == 6e-6
    few_hard = values(config, 200, Evidence(photos=200, accuracy=0.3, lost=0, won=0))
    assert few_hard["backbone_learning_rate"] == 2.1e-4
    assert values(config, 20, "too few")["backbone_learning_rate"] == 6e-7
    from_scratch = dataclasses.replace(config, weights="none")
    assert values(from_scratch, 20, "too few")["backbone_learning_rate"] == 3e-5
    text = values(config, 1_600, Evidence(photos=256, accuracy=0.9, lost=73, won=3))
    assert not text["horizontal_flip"]
    assert not text["mirror_averaging"]


def test_few_photos_are_shown_several_times_per_epoch():
    def steps(photos: int, found: Evidence | str) -> object:
        return values(TrainConfig(), photos, found)["steps_per_epoch"]

    hard, easy = (Evidence(photos=64, accuracy=share, lost=0, won=0) for share in (0.5, 0.95))
    assert values(TrainConfig(), 20, "too few")["head_epochs"] == 4
    assert values(TrainConfig(steps_per_epoch=0), 20, "too few")["head_epochs"] == 80
    assert values(TrainConfig(steps_per_epoch=5), 20, "too few")["head_epochs"] == 16
    assert steps(20, "too few") == steps(480, hard) == 20
    assert steps(300, easy) == steps(300, hard) == steps(640, hard) == 0


def test_without_evidence_the_choices_are_the_fallbacks():
    config = TrainConfig(backbone_learning_rate=1e-3)
    found = values(config, 1_600, "the labels are not one class per photo")
    plain = without_auto(config)
    assert found == {name: getattr(plain, name) for name in found}
    assert len(found) == 5
    assert "backbone_learning_rate" not in found
    small = choose(config, 1_600, FirstLayers("block3", "block3"), lambda: "no evidence")
    assert small["unfreeze_from"] == Choice("block3", "no evidence")


def test_evidence_is_not_computed_if_no_setting_needs_it():
    config = without_auto(TrainConfig())
    assert automatic_settings(config) == []
    config = dataclasses.replace(config, evaluation_scale="auto")

    def fail() -> str:
        raise AssertionError

    assert choose(config, 100, LAYERS, fail) == {}


def test_the_hyperrule_chooses_its_settings_itself():
    found = values(TrainConfig(hyperrule=True, head_epochs=0), 100, "too few")
    assert not found.keys() & {"steps_per_epoch", "head_epochs"}


def test_a_given_value_is_kept():
    config = with_choices(TrainConfig(horizontal_flip=False), {"horizontal_flip": Choice(True, "")})
    assert not config.horizontal_flip


@pytest.mark.parametrize("name", ["epochs", "trunk_cache", "folder_layout"])
def test_auto_is_only_replaced_where_a_rule_chooses(name):
    assert name not in automatic_settings(TrainConfig())


def test_a_run_prints_its_choices_and_keeps_them(photo_folder, tmp_path, capsys):
    weights = tmp_path / "net.weights.h5"
    build_network(SMALL_CONFIG, ("a", "b")).network.model.backbone.save_weights(weights)
    config = dataclasses.replace(
        SMALL_CONFIG,
        image_folder=str(photo_folder),
        image_size=48,
        distribution="none",  # and not on all logical devices of the tests
        weights=str(weights),
        ckpt_dir=str(tmp_path / "run"),
        epochs=0,
        steps_per_epoch=2,
        head_epochs=1,
        **dict.fromkeys(("unfreeze_from", "backbone_learning_rate"), "auto"),
        **dict.fromkeys(("horizontal_flip", "evaluation_scale"), "auto"),
    )
    directory = train(config)
    assert directory is not None
    printed = " ".join(capsys.readouterr().out.split())
    written = json.loads(directory.config_file.read_text())
    reasons = written["chosen_automatically"]
    assert set(reasons) == set(automatic_settings(config))
    assert "frozen features classify" in reasons["backbone_learning_rate"]
    assert "the validation loss is" in reasons["evaluation_scale"]
    for name, reason in reasons.items():
        value = written[name]
        assert value != "auto"
        flag = f"--{name}={value}" if not isinstance(value, bool) else f"{name}:"
        assert flag in printed
        assert reason in printed
    # The same command resumes the run, also with a chosen value in place of `auto`.
    rate = written["backbone_learning_rate"]
    for same in (config, dataclasses.replace(config, backbone_learning_rate=rate)):
        _, resumes = find_run(same)
        assert resumes
    with pytest.raises(UserError, match=f"backbone_learning_rate was {rate} and is now 0.5"):
        find_run(dataclasses.replace(config, backbone_learning_rate=0.5))
    assert json.loads(directory.config_file.read_text()) == written


@pytest.mark.parametrize(
    ("larger", "scale"), [([0.5, 0.3, 0.4], 1.2), ([0.6, 0.2, 0.5], 1.2), ([0.7, 0.4, 0.6], 1.0)]
)
def test_a_larger_size_is_chosen_unless_it_is_clearly_worse(monkeypatch, larger, scale):
    losses = {160: np.array([0.5, 0.3, 0.4]), 192: np.array(larger)}
    monkeypatch.setattr(
        evaluation_size,
        "validation_losses",
        lambda task, network, loader: losses[loader],
    )
    monkeypatch.setattr(evaluation_size, "make_loader", lambda config, source: config.image_size)

    def refuse(weights: list) -> None:
        raise ValueError("another shape")

    model = SimpleNamespace(get_weights=list, set_weights=lambda weights: None)
    built = SimpleNamespace(network=SimpleNamespace(model=model))
    monkeypatch.setattr(evaluation_size, "build_network", lambda *_, **__: built)
    run = SimpleNamespace(
        config=TrainConfig(),
        plan=SimpleNamespace(validates=True),
        built=built,
        averages=None,
        loader=SimpleNamespace(class_names=("a", "b"), source=None),
        task=None,
    )
    last_epoch = EpochInput(built.network, loader=160)
    choice = choose_evaluation_scale(run, last_epoch)
    assert choice.value == scale
    assert "at 192 pixels, and 0.4000 at 160 pixels" in choice.reason
    model.set_weights = refuse
    choice = choose_evaluation_scale(run, last_epoch)
    assert choice == Choice(1.0, "the network does not take 192 pixels: another shape")
    run.plan.validates = False
    assert choose_evaluation_scale(run, last_epoch).value == 1.0
