"""The same steps on several devices, in parts and compiled: weights end as on one device."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import keras
import numpy as np
import pytest

from research.loop.run_state import make_checkpoint
from research.runs.restore import restore_model
from research.tasks.metrics import Metrics
from tests.learners import CONFIG, ODD, feed, make_learner, model_of, some_photos, train, weights

SETTINGS = {"plain": CONFIG, "clipped, decayed, penalized": ODD}
COUNTS = (16, 21, 17)  # of photos: even; uneven; a replica without a real photo


class Passes(NamedTuple):
    """What training leaves: one pass over each of COUNTS photos, one after another."""

    losses: list[list[float]]
    weights: list[np.ndarray]
    photos: float  # that the tally counted
    evaluations: list[Metrics]


@functools.cache
def passes(setting: str, replicas: int = 1, xla: bool = False) -> Passes:
    learner = make_learner(SETTINGS[setting], replicas, xla=xla)
    losses, evaluations = [], []
    for count in COUNTS:
        examples = some_photos(count)
        losses.append(train(learner, examples, 8))
        evaluations.append(learner.evaluate(feed(learner, examples, 8)))
    return Passes(
        losses, weights(learner), float(learner.state.tally.read()["weight"]), evaluations
    )


@pytest.mark.parametrize(
    ("setting", "replicas"), [("plain", 2), ("clipped, decayed, penalized", 4)]
)
def test_several_devices_give_what_one_gives(setting, replicas):
    one, many = passes(setting), passes(setting, replicas)
    for single, mirrored in zip(one.losses, many.losses, strict=True):
        np.testing.assert_allclose(single, mirrored, rtol=1e-5)
    for single, mirrored in zip(one.weights, many.weights, strict=True):
        np.testing.assert_allclose(single, mirrored, rtol=1e-4, atol=1e-5)
    assert one.photos == many.photos == sum(COUNTS)
    for count, single, mirrored in zip(COUNTS, one.evaluations, many.evaluations, strict=True):
        assert single.photos == mirrored.photos == count
        np.testing.assert_allclose(single.loss, mirrored.loss, rtol=1e-5)
        assert single["accuracy"] == mirrored["accuracy"]


@pytest.mark.parametrize(
    ("replicas", "size", "photos", "unfreeze_from"),
    [(2, 5, 11, "0"), (4, 8, 17, "stage3_block1_2_bn")],
)
def test_synchronised_batch_norm_gives_what_one_device_gives(replicas, size, photos, unfreeze_from):
    """Also where no number of devices divides the batch, or a device has no photo."""
    config = dataclasses.replace(
        CONFIG, bn_mode="sync", unfreeze_from=unfreeze_from, batch_size=size
    )
    one, many = make_learner(config), make_learner(config, replicas)
    before = weights(one)
    examples = some_photos(photos)
    np.testing.assert_allclose(train(one, examples, size), train(many, examples, size), rtol=1e-4)
    moved = 0.0
    for start, single, mirrored in zip(before, weights(one), weights(many), strict=True):
        np.testing.assert_allclose(single, mirrored, rtol=1e-3, atol=1e-4)
        moved = max(moved, np.abs(single - start).max(initial=0))
    assert moved > 0.05  # far more than the tolerance


def test_batch_norm_that_is_not_synchronised_sees_its_devices_photos():
    """Two devices of four photos each do what one does with two batches of four."""
    config = dataclasses.replace(CONFIG, bn_mode="train", unfreeze_from="stage3")
    two = make_learner(config, 2)
    one = make_learner(dataclasses.replace(config, accumulate_steps=2))
    examples = some_photos(16)
    np.testing.assert_allclose(train(one, examples, 4), train(two, examples, 8), rtol=1e-4)
    for single, mirrored in zip(
        model_of(one).trainable_variables, model_of(two).trainable_variables, strict=True
    ):
        np.testing.assert_allclose(single.numpy(), mirrored.numpy(), rtol=1e-3, atol=1e-4)


def test_a_device_without_photos_keeps_its_statistics():
    config = dataclasses.replace(CONFIG, bn_mode="train", unfreeze_from="stage3")
    learner = make_learner(config, 2)
    train(learner, some_photos(1), 1)  # none for the second device
    norm = next(
        layer
        for layer in model_of(learner).backbone.layers
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
    )
    means = [value.numpy() for value in norm.moving_mean.value.values]
    assert [np.abs(mean).max() > 0 for mean in means] == [True, False]
    assert all(np.isfinite(value).all() for value in weights(learner))


def test_accumulated_batches_are_the_large_batch_that_they_stand_for():
    whole = make_learner(dataclasses.replace(ODD, batch_size=12))
    parts = dataclasses.replace(ODD, batch_size=4, accumulate_steps=3)
    parted = [make_learner(parts), make_learner(parts, 2)]
    counts = (24, 21, 9)  # even; a short batch; whole batches missing
    for photos in counts:
        examples = some_photos(photos)
        losses = train(whole, examples, 12)
        for learner in parted:
            np.testing.assert_allclose(losses, train(learner, examples, 4), rtol=1e-5)
            for one, other in zip(weights(whole), weights(learner), strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    for learner in parted:
        assert float(learner.state.tally.read()["weight"]) == sum(counts)
        assert learner.state.current_step == whole.state.current_step


def test_accumulated_batches_work_with_synchronised_batch_norm():
    config = dataclasses.replace(CONFIG, bn_mode="sync", unfreeze_from="stage3", accumulate_steps=2)
    one, two = make_learner(config), make_learner(config, 2)
    examples = some_photos(21)
    np.testing.assert_allclose(train(one, examples, 4), train(two, examples, 4), rtol=1e-4)
    for single, mirrored in zip(weights(one), weights(two), strict=True):
        np.testing.assert_allclose(single, mirrored, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("replicas", [1, 2])
def test_xla_computes_the_same(replicas):
    setting = "clipped, decayed, penalized"
    plain, compiled = passes(setting), passes(setting, replicas, xla=True)
    for one, other in zip(plain.losses, compiled.losses, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4)
    for one, other in zip(plain.weights, compiled.weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("path", "bn_mode"), [((2, 1), "train"), ((1, 2), "frozen")])
def test_a_run_goes_on_with_another_number_of_devices(path, bn_mode, tmp_path):
    """Losses after the change are those of the run that stayed on one device."""
    config = dataclasses.replace(
        CONFIG, bn_mode=bn_mode, head_optimizer="adam", backbone_optimizer="rmsprop"
    )
    config = dataclasses.replace(config, head_learning_rate=1e-3, backbone_learning_rate=1e-4)
    examples = some_photos(21)
    first, second = (make_learner(config, replicas) for replicas in path)
    train(first, examples, 8)
    first.average_statistics()
    path = make_checkpoint(model_of(first), first.groups, first.state).save(str(tmp_path / "step"))
    make_checkpoint(model_of(second), second.groups, second.state).restore(path).assert_consumed()
    assert second.state.current_step == 3
    stayed = train(first, examples, 8)
    # BatchNorm in mode `train` sees each device's photos alone: close, but not the same.
    tolerance = 1e-4 if bn_mode == "frozen" else 0.1
    np.testing.assert_allclose(stayed, train(second, examples, 8), rtol=tolerance)


def test_statistics_learned_on_several_devices_are_averaged(tmp_path):
    """What is evaluated on two devices is what a checkpoint gives one."""
    config = dataclasses.replace(CONFIG, bn_mode="train", unfreeze_from="0")
    two, one = make_learner(config, 2), make_learner(config)
    examples = some_photos(16)
    train(two, examples, 8)
    two.average_statistics()
    norm = next(
        x for x in model_of(two).backbone.layers if isinstance(x, keras.layers.BatchNormalization)
    )
    first, second = (value.numpy() for value in norm.moving_mean.value.values)
    assert np.abs(first).max() > 0
    np.testing.assert_array_equal(first, second)
    path = make_checkpoint(model_of(two), two.groups, two.state).save(str(tmp_path / "step"))
    restore_model(model_of(one), path)

    def loss(learner):
        batches = feed(learner, examples, 8)
        return learner.evaluate(batches).loss

    assert loss(one) == pytest.approx(loss(two), rel=1e-5)
