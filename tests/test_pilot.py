"""The pilot: what frozen features tell, and the regression that the head starts from."""

from __future__ import annotations

import dataclasses
import shutil
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import StratifiedKFold

from research.data.folder.folder_source import FolderSource
from research.data.split_arrays import SplitArrays
from research.loop.builder import build_network, make_loader
from research.loop.pilot import Pilot, fit_head, left_out_predictions
from research.loop.preparation import choose_settings, set_up
from research.settings.automatic import Change, Evidence, without_auto
from research.system.team import Team
from research.tasks.task import Task
from tests.helpers import SMALL_CONFIG


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


def draw_features(classes: int, per_class: int, seed: int = 0) -> tuple[list, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.arange(classes * per_class) % classes)
    centres = generator.random((classes, 60))
    return [centres[labels] + generator.normal(0, 1, (len(labels), 60)) for _ in range(2)], labels


@pytest.mark.parametrize(
    ("classes", "units", "calibrated", "class_weights"),
    [
        (2, 1, False, None),
        (4, 4, False, None),
        (4, 4, True, None),
        (4, 4, True, (1.0, 1.0, 0.3, 1.0)),
    ],
)
def test_the_regression_predicts_left_out_photos_best(classes, units, calibrated, class_weights):
    views, labels = draw_features(classes, 7)
    kernel, bias = fit_head(views, labels, class_weights, calibrated)
    assert (kernel.shape, bias.shape) == ((60, units), (units,))

    def fit(photos: np.ndarray, prior: float) -> LogisticRegression:
        regression = LogisticRegression(C=prior / 2, max_iter=10_000, tol=1e-8)
        return regression.fit(
            np.concatenate([view[photos] for view in views]),
            np.tile(labels[photos], 2),
            np.tile(weights[photos], 2),
        )

    weights = np.asarray(class_weights or [1.0] * classes)[labels]
    factors, losses = np.linspace(0, 1, 201) if calibrated else np.ones(1), {}
    for prior in (0.01, 0.1, 1.0, 2.0):
        losses[prior] = np.zeros(len(factors))
        folds = StratifiedKFold(5, shuffle=True, random_state=0).split(labels, labels)
        for others, left_out in folds:
            for view in views:
                found = fit(others, prior).predict_log_proba(view[left_out])
                scaled = log_softmax(factors[:, None, None] * found, axis=2)
                right = scaled[:, np.arange(len(found)), labels[left_out]]
                losses[prior] -= right @ weights[left_out]
    assert len({round(loss.min(), 3) for loss in losses.values()}) == 4
    best = min(losses, key=lambda prior: losses[prior].min())
    factor = factors[losses[best].argmin()]
    assert (0.1 < factor < 0.9) == calibrated
    expected = fit(np.arange(len(labels)), best)
    logits = (views[0] @ expected.coef_.T + expected.intercept_).reshape(len(labels), -1)
    np.testing.assert_allclose(views[0] @ kernel + bias, factor * logits, atol=0.05)
    assert np.ptp(logits) > 1


def test_the_regression_takes_class_weights_and_one_photo_per_class():
    views, labels = draw_features(3, 1)
    kernel, _ = fit_head(views[:1], labels)
    expected = LogisticRegression(C=1.0).fit(views[0], labels)
    np.testing.assert_allclose(kernel.T, expected.coef_, atol=5e-3)
    views, labels = draw_features(2, 30)
    mean_logits = [
        np.mean(views[0] @ kernel + bias)
        for kernel, bias in (fit_head(views, labels, factors) for factors in (None, (1.0, 9.0)))
    ]
    assert mean_logits[1] > mean_logits[0] + 0.3


@pytest.mark.parametrize("place", ["border", "everywhere"])
def test_crops_that_lose_the_class_are_worse_than_whole_photos(place):
    photos = np.random.default_rng(0).integers(0, 50, (64, 32, 32, 3)).astype(np.uint8)
    labels = np.arange(64, dtype=np.int32) % 2
    inside = photos[:, 2:-2, 2:-2].copy()  # what a crop of three quarters of the area keeps
    photos[labels == 1] += 200
    if place == "border":
        photos[:, 2:-2, 2:-2] = inside
    network = build_network(SMALL_CONFIG, ("dark", "bright")).network
    loader = SimpleNamespace(
        class_names=("dark", "bright"),
        examples=lambda split: SplitArrays((photos,), labels, ()),
        preprocessing=lambda images: images / 255,
    )
    pilot = Pilot(network.model, loader, Task(), 0)
    assert pilot.evidence() == Evidence(photos=64, accuracy=1.0, mirrored=Change(0, 0))
    changed = pilot.cropped()
    assert changed.won == 0
    assert changed.is_worse == (changed.lost >= 16) == (place == "border")


def test_no_crops_are_chosen_if_the_first_trained_layer_is_after_the_last():
    model = build_network(SMALL_CONFIG, ("a", "b")).network.model
    pilot = SimpleNamespace(
        model=model,
        evidence=lambda: Evidence(photos=256, accuracy=0.7, mirrored=Change(0, 0)),
        cropped=lambda: Change(0, 0),
    )
    team = SimpleNamespace(leads=True, from_chief=lambda chosen: chosen)
    count = len(model.backbone.layers)
    for first, area in ((count - 3, 0.5), (count, 1.0)):
        config = dataclasses.replace(
            SMALL_CONFIG, unfreeze_from=str(first), epochs=3, random_crop_area="auto"
        )
        chosen = choose_settings(config, team, pilot, 1000, False)
        assert chosen["random_crop_area"].value == area


def test_the_head_starts_from_the_regression_on_all_usable_photos(photo_folder, tmp_path):
    photo_folder = shutil.copytree(photo_folder, tmp_path / "photos")
    for damaged in sorted((photo_folder / "cat").iterdir())[:10]:  # found when they are read
        damaged.write_bytes(damaged.read_bytes()[:200])
    config = dataclasses.replace(SMALL_CONFIG, image_folder=str(photo_folder))
    source = FolderSource(str(photo_folder))
    on_demand = dataclasses.replace(config, photo_cache="none")
    loader, reading = (make_loader(without_auto(one), source) for one in (config, on_demand))
    model = build_network(config, loader.class_names).network.model
    photos = loader.examples("train")
    assert len(photos.damaged) > 2
    views = [
        model.pooling(model.backbone(loader.preprocessing(tf.constant(one, tf.float32)))).numpy()
        for one in (photos.inputs[0][:], photos.inputs[0][:][:, :, ::-1])
    ]
    for own, calibrated in ((loader, False), (reading, True)):
        kernel, bias = fit_head(views, photos.labels, calibrated=calibrated)
        assert np.abs(kernel).max() > 0.01
        Pilot(model, own, Task(), 0).start_head(True, calibrated)
        np.testing.assert_allclose(model.head.kernel.numpy(), kernel, rtol=0.01, atol=1e-3)
        np.testing.assert_allclose(model.head.bias.numpy(), bias, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize(
    ("first_layer", "epochs", "calibrated"),
    [
        ("none", 1, True),
        ("end", 1, True),
        ("last", 1, False),
        ("last", 0, True),
        ("auto", 1, True),
    ],
)
def test_the_regression_is_calibrated_if_only_the_head_is_trained(
    photo_folder, monkeypatch, first_layer, epochs, calibrated
):
    class StartedError(Exception):
        pass

    def stop(pilot: Pilot, mirrored: bool, calibrated: bool) -> None:
        raise StartedError(calibrated)

    monkeypatch.setattr(Pilot, "start_head", stop)
    source = FolderSource(str(photo_folder))
    layers = len(build_network(SMALL_CONFIG, source.class_names).network.model.backbone.layers)
    names = {"end": str(layers), "last": str(layers - 1)}
    config = dataclasses.replace(
        SMALL_CONFIG,
        image_folder=str(photo_folder),
        head_start="regression",
        unfreeze_from=names.get(first_layer, first_layer),
        epochs=epochs,
    )
    with pytest.raises(StartedError) as started:
        set_up(config, Team(tf.distribute.get_strategy()), source)
    assert started.value.args == (calibrated,)


def test_heads_that_a_regression_does_not_give():
    class OwnLosses(Task):
        def losses(self, logits, batch):
            return super().losses(logits, batch)

    labels = np.arange(40) % 3
    photos = SplitArrays((np.zeros((40, 8, 8, 3), np.uint8),), labels, ())

    def obstacle(head: keras.layers.Layer, task: Task | None = None, names: str = "abc") -> str:
        head.build((None, 5))
        model = SimpleNamespace(head=head, feature_shape=(5,))
        loader = SimpleNamespace(class_names=tuple(names), examples=lambda split: photos)
        return Pilot(model, loader, task or Task(), 0).regression_obstacle

    dense = keras.layers.Dense
    assert obstacle(dense(3)) is None
    assert obstacle(dense(3), OwnLosses()) == "OwnLosses has losses of its own"
    assert obstacle(dense(3, activation="relu")) == "the head of Task is not one linear layer"
    assert obstacle(keras.Sequential([dense(3)])) == "the head of Task is not one linear layer"
    assert obstacle(dense(2)) == "the head has 2 logits, and not 3"
    assert obstacle(dense(4), names="abcd") == "the sample has no photo of 'd'"


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
    pilot = Pilot(None, loader, Task(), 0)
    assert pilot.evidence() == reason
    if "labels" in reason:
        assert pilot.regression_obstacle == reason
