"""The settings with the value `auto`: the rules, and runs that keep their choices."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from research.evaluation import evaluation_size
from research.evaluation.evaluation_size import (
    choose_evaluation_scale,
    enlarged_network,
    validation_losses,
)
from research.loop import builder, preparation
from research.loop.builder import build_network, head_schedule
from research.loop.plan import make_plan
from research.loop.preparation import Run
from research.loop.steps import predict_step
from research.loop.trunk.frozen_layers import EpochInput
from research.models.backbone import FirstLayers
from research.runs.console import finished_note
from research.runs.find_run import find_run
from research.settings.automatic import (
    Change,
    Choice,
    Evidence,
    automatic_settings,
    choose,
    with_choices,
    without_auto,
)
from research.settings.train_config import TrainConfig
from research.system.errors import UserError
from research.tasks.task import Task
from research.train import train
from tests.helpers import SMALL_CONFIG, read_checkpoint

LAYERS = FirstLayers("100", "stage4")
KEPT, WORSE = Change(lost=10, won=7), Change(lost=50, won=25)


def small_run(photos: Path, folder: Path, **settings: Any) -> TrainConfig:
    return dataclasses.replace(
        SMALL_CONFIG,
        image_folder=str(photos),
        ckpt_dir=str(folder),
        distribution="none",  # and not on all logical devices of the tests
        **settings,
    )


def values(
    config: TrainConfig,
    photos: int,
    found: Evidence | str,
    obstacle: str | None = None,
    cropped: Change = KEPT,
) -> dict[str, object]:
    choices = choose(config, photos, LAYERS, lambda: found, lambda: cropped, lambda: obstacle)
    return {name: one.value for name, one in choices.items()}


def test_what_photos_tell_decides():
    config = TrainConfig()
    hard = values(config, 1_600, Evidence(photos=256, accuracy=0.75, mirrored=Change(20, 18)))
    assert hard == {
        "head_start": "initial",
        "unfreeze_from": "stage4",
        "steps_per_epoch": 0,
        "head_epochs": 3,
        "backbone_learning_rate": 1.5e-4,
        "horizontal_flip": True,
        "random_crop_area": 0.5,
        "mirror_averaging": True,
    }
    harder = values(config, 1_600, Evidence(photos=256, accuracy=0.3, mirrored=Change(20, 18)))
    assert harder["backbone_learning_rate"] == 4.2e-4
    easy = values(config, 1_600, Evidence(photos=256, accuracy=0.99, mirrored=Change(0, 0)))
    assert (easy["unfreeze_from"], easy["backbone_learning_rate"]) == ("100", 3e-5)
    few = values(config, 200, Evidence(photos=200, accuracy=0.99, mirrored=Change(0, 0)))
    assert few["backbone_learning_rate"] == 6e-6
    few_hard = values(config, 200, Evidence(photos=200, accuracy=0.3, mirrored=Change(0, 0)))
    assert few_hard["backbone_learning_rate"] == 2.1e-4
    assert values(config, 20, "too few")["backbone_learning_rate"] == 6e-7
    from_scratch = dataclasses.replace(config, weights="none")
    assert values(from_scratch, 20, "too few")["backbone_learning_rate"] == 3e-5
    text = values(config, 1_600, Evidence(photos=256, accuracy=0.9, mirrored=Change(73, 3)))
    assert not text["horizontal_flip"]
    assert not text["mirror_averaging"]


def test_photos_that_frozen_features_predict_wrongly_are_cropped_at_random():
    harder, hard, easy = (
        Evidence(photos=256, accuracy=share, mirrored=Change(0, 0)) for share in (0.4, 0.5, 0.95)
    )

    def area(photos: int, found: Evidence | str, cropped: Change = KEPT, **settings: Any) -> object:
        found = values(TrainConfig(**settings), photos, found, cropped=cropped)
        return found["random_crop_area"]

    assert area(400, hard) == area(400, hard, trunk_cache="off") == 0.5
    assert area(400, hard, WORSE) == 1  # as for letters
    assert area(399, hard) == area(1_600, easy) == area(1_600, "no evidence") == 1
    assert area(400, harder) == 1  # too few are right to tell what crops change
    assert area(400, hard, unfreeze_from="none") == area(400, hard, epochs=0) == 1
    # The outputs of frozen layers for random views cannot be cached.
    assert area(400, hard, trunk_cache="memory") == area(400, hard, trunk_cache="disk") == 1
    assert "random_crop_area" not in values(TrainConfig(random_crop_area=0.3), 400, hard)


def test_with_few_photos_the_head_starts_from_a_regression():
    found = Evidence(photos=150, accuracy=0.5, mirrored=Change(0, 0))
    chosen = values(TrainConfig(), 150, found)
    assert (chosen["head_start"], chosen["head_epochs"]) == ("regression", 0)
    assert (chosen["unfreeze_from"], chosen["steps_per_epoch"]) == ("none", 0)
    assert values(TrainConfig(), 20, "too few")["steps_per_epoch"] == 0
    more = values(TrainConfig(), 160, found)
    assert (more["head_start"], more["head_epochs"]) == ("regression", 0)
    assert more["unfreeze_from"] == "stage4"
    for config, photos, obstacle in (
        (TrainConfig(), 257, None),
        (TrainConfig(), 150, "labels"),
        (TrainConfig(head_epochs=3), 150, None),
        (TrainConfig(hyperrule=True), 150, None),
    ):
        other = values(config, photos, found, obstacle)
        assert other["head_start"] == "initial"
        assert other["unfreeze_from"] == "stage4"
        assert other.get("head_epochs") != 0
    # A regression on a sample is only the start for epochs with all photos.
    asked = values(TrainConfig(head_start="regression"), 1_600, found)
    assert asked["head_epochs"] == 3


def test_after_a_regression_the_head_has_the_rate_for_tuning():
    config = TrainConfig(head_start="regression", head_epochs=0, warmup="0steps")
    plan = make_plan(without_auto(config), 320)
    for start, rate in (("regression", 1e-4), ("initial", 3e-3)):
        schedule = head_schedule(dataclasses.replace(config, head_start=start), plan, False)
        assert float(schedule(tf.constant(0))) == pytest.approx(rate)
    plan = make_plan(without_auto(dataclasses.replace(config, head_epochs=2)), 320)
    assert float(head_schedule(config, plan, False)(tf.constant(0))) == pytest.approx(3e-3)


def test_few_photos_are_shown_several_times_per_epoch():
    def steps(photos: int, found: Evidence | str) -> object:
        return values(TrainConfig(), photos, found)["steps_per_epoch"]

    hard, easy = (
        Evidence(photos=64, accuracy=share, mirrored=Change(0, 0)) for share in (0.5, 0.95)
    )

    def head_epochs(steps: object) -> object:
        return values(TrainConfig(steps_per_epoch=steps), 20, "too few", "labels")["head_epochs"]

    assert [head_epochs(number) for number in ("auto", 0, 5)] == [4, 80, 16]
    assert values(TrainConfig(), 20, "too few", "labels")["steps_per_epoch"] == 20
    assert steps(480, hard) == 20
    assert steps(300, easy) == steps(300, hard) == steps(640, hard) == 0


def test_without_evidence_the_choices_are_the_fallbacks():
    config = TrainConfig(backbone_learning_rate=1e-3)
    found = values(config, 1_600, "the labels are not one class per photo")
    plain = without_auto(config)
    assert found == {name: getattr(plain, name) for name in found}
    assert len(found) == 7
    assert "backbone_learning_rate" not in found
    block = FirstLayers("block3", "block3")
    small = choose(config, 1_600, block, lambda: "no evidence", lambda: KEPT, lambda: None)
    assert small["unfreeze_from"] == Choice("block3", "no evidence")


def test_evidence_is_not_computed_if_no_setting_needs_it():
    config = without_auto(TrainConfig())
    assert automatic_settings(config) == []
    config = dataclasses.replace(config, evaluation_scale="auto")

    def fail() -> str:
        raise AssertionError

    assert choose(config, 100, LAYERS, fail, fail, fail) == {}
    config = dataclasses.replace(config, head_start="auto")
    assert choose(config, 100, LAYERS, fail, fail, fail)["head_start"].value == "initial"


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
    config = small_run(
        photo_folder,
        tmp_path / "run",
        image_size=48,
        weights=str(weights),
        epochs=0,
        steps_per_epoch=2,
        head_epochs=1,
        **dict.fromkeys(("unfreeze_from", "backbone_learning_rate"), "auto"),
        **dict.fromkeys(("horizontal_flip", "evaluation_scale", "head_start"), "auto"),
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


def test_a_longer_run_chooses_its_evaluation_size_again(photo_folder, tmp_path):
    config = small_run(
        photo_folder,
        tmp_path / "run",
        image_size=48,
        epochs=1,
        head_epochs=0,
        evaluation_scale="auto",
        **dict.fromkeys(("head_schedule", "backbone_schedule"), "constant"),
    )
    reasons = []
    for epochs in (1, 2, 2):
        directory = train(dataclasses.replace(config, epochs=epochs))
        reasons.append(directory.read_choices()["evaluation_scale"].reason)
        assert directory.read_config().evaluation_scale in (1.0, 1.2)
    assert reasons[0] != reasons[1] == reasons[2]
    assert "the validation loss is" in reasons[1]


def test_early_stopping_counts_the_epochs_in_which_all_groups_that_train_are_trained():
    def counted(*beginnings: int) -> list[bool]:
        groups = [SimpleNamespace(schedule=SimpleNamespace(first_step=one)) for one in beginnings]
        run = SimpleNamespace(groups=groups, plan=SimpleNamespace(steps=12, steps_per_epoch=3))
        return [preparation.Run.counts_for_early_stopping(run, epoch) for epoch in range(4)]

    assert counted(0) == [True] * 4
    assert counted(0, 6) == [False, False, True, True]
    assert counted(0, 12) == [True] * 4  # --epochs=0: the backbone is never trained


def test_a_run_that_early_stopping_ended_cannot_be_made_longer():
    config = TrainConfig(head_schedule="constant", backbone_schedule="constant")
    assert finished_note(config, False).endswith("to train longer, increase --epochs")
    assert finished_note(config, True).endswith("ended this run; to train longer, start a new run")


def test_a_run_that_ended_before_its_first_checkpoint_starts_from_the_same_head(
    photo_folder, tmp_path
):
    config = small_run(
        photo_folder,
        tmp_path / "run",
        head_start="auto",
        head_epochs="auto",
        weights=str(tmp_path / "net.weights.h5"),
        epochs=1,
    )
    build_network(SMALL_CONFIG, ("a", "b")).network.model.backbone.save_weights(config.weights)
    weights = []
    for _ in range(2):
        directory = train(config)
        weights.append(read_checkpoint(directory.path))
        shutil.rmtree(directory.checkpoints)
        for name in ("metrics.jsonl", "result.json"):
            (directory.path / name).unlink()
    assert json.loads(directory.config_file.read_text())["head_start"] == "regression"
    first, again = weights
    assert first.keys() == again.keys()
    for name, value in first.items():  # the second run is not trained from zeros
        np.testing.assert_array_equal(value, again[name])


def test_a_regression_that_cannot_be_computed_is_refused(photo_folder, tmp_path):
    config = small_run(photo_folder, tmp_path / "run", head_start="regression")

    class Doubled(Task):
        def losses(self, logits, batch):
            return 2 * super().losses(logits, batch)

    with pytest.raises(UserError, match=r"regression', but .*has losses of its own; leave out"):
        train(config, task=Doubled)
    assert not (tmp_path / "run").exists()


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

    def refuse(run: Run, config: TrainConfig) -> None:
        raise ValueError("another shape")

    built = SimpleNamespace(network=None)
    monkeypatch.setattr(evaluation_size, "enlarged_network", lambda run, config: None)
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
    losses[192] = np.array([0.6, np.nan, 0.6])  # the second photo was found to be damaged
    choice = choose_evaluation_scale(run, last_epoch)
    assert choice.value == 1.0
    assert "is 0.6000 at 192 pixels, and 0.4500 at 160 pixels" in choice.reason
    losses[192] = np.full(3, np.nan)
    assert "no usable validation photo" in choose_evaluation_scale(run, last_epoch).reason
    monkeypatch.setattr(evaluation_size, "enlarged_network", refuse)
    choice = choose_evaluation_scale(run, last_epoch)
    assert choice == Choice(1.0, "the network does not take 192 pixels: another shape")
    run.plan.validates = False
    assert choose_evaluation_scale(run, last_epoch).value == 1.0


@pytest.mark.parametrize(
    ("backbone", "image_size", "task", "shares"),
    [
        ("MobileNetV2", 64, "classification", True),
        ("MobileNetV2", 48, "classification", False),  # a padding depends on odd sizes
        ("ViTTiny", 64, "classification", False),  # has an inner model
        ("SmallResNet", 64, "head.py:Head", False),
    ],
)
def test_the_network_at_a_larger_size_is_the_one_that_is_built_for_it(
    backbone, image_size, task, shares
):
    config = TrainConfig(
        backbone=backbone, weights="none", image_size=image_size, unfreeze_from="4", seed=3
    )
    names = ("a", "b", "c")
    run = SimpleNamespace(
        config=config,
        built=build_network(config, names),
        loader=SimpleNamespace(class_names=names),
        task=Task(),
    )
    larger = dataclasses.replace(config, image_size=96, task=task)
    network, model = enlarged_network(run, larger), run.built.network.model
    assert (network.model is model) == shares
    model.head.kernel.assign(np.random.default_rng(0).normal(size=model.head.kernel.shape))
    for variable in model.backbone.variables:
        variable.assign(variable * np.random.default_rng(0).uniform(0.9, 1.1, variable.shape))
    if not shares:
        network = enlarged_network(run, larger)
    fresh = build_network(larger, names, Task()).network
    fresh.model.set_weights(model.get_weights())
    photos = np.random.default_rng(1).normal(size=(2, 96, 96, 3)).astype(np.float32)
    batch = {"image": tf.constant(photos), "weight": tf.ones(2)}
    expected, found = (predict_step(one, batch).numpy() for one in (fresh, network))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.ptp(expected))
    assert np.ptp(expected, axis=0).min() > 0


def test_the_validation_loss_of_a_damaged_photo_is_unknown(monkeypatch):
    batch = {"weight": tf.constant([1.0, 0.0, 1.0]), "label": tf.constant([1, 0, 0])}
    loader = SimpleNamespace(
        finish=lambda batch: batch,
        split_batches=lambda split: tf.data.Dataset.from_tensors(batch),
    )
    monkeypatch.setattr(evaluation_size, "predict_step", lambda *_: tf.constant([[0.0]] * 3))
    found = validation_losses(Task(("a", "b")), None, loader)
    np.testing.assert_allclose(found, [np.log(2), np.nan, np.log(2)], rtol=1e-6)


@pytest.mark.parametrize("trunk_cache", ["off", "memory"])
def test_a_run_whose_photos_the_device_finishes_is_the_same(
    photo_folder, tmp_path, monkeypatch, trunk_cache
):
    """As on a GPU: the steps, the validation and the choice of the size get photos as bytes."""
    rows, choices = [], []
    make, made = builder.make_loader, []

    def make_as_on_a_gpu(*arguments):
        loader = make(*arguments)
        loader.finishes_on_device = True
        made.append(loader)
        return loader

    for name in ("plain", "finished"):
        config = small_run(
            photo_folder,
            tmp_path / name,
            image_size=96,
            trunk_cache=trunk_cache,
            head_epochs=1,
            epochs=2,
            mirror_averaging=True,
            evaluation_scale="auto",
        )
        directory = train(config)
        assert directory is not None
        rows.append(directory.read_metrics())
        choices.append(directory.read_choices())
        for module in (preparation, evaluation_size):
            monkeypatch.setattr(module, "make_loader", make_as_on_a_gpu)
    assert {loader.train_batches.element_spec["image"].dtype for loader in made} == {tf.uint8}
    assert {loader.image_size for loader in made} == {96, 128}
    assert "at 128 pixels" in choices[0]["evaluation_scale"].reason
    assert choices[0] == choices[1]
    for plain, finished in zip(*rows, strict=True):
        for figure in ("train_loss", "validation_loss"):
            np.testing.assert_allclose(finished[figure], plain[figure], rtol=1e-5)
