"""The same steps on several devices, in parts and compiled: weights end as on one device."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import keras
import numpy as np
import pytest

from research.loop.learner import Learner
from research.loop.run_state import make_checkpoint
from research.tasks.metrics import Metrics
from tests.learners import (
    CONFIG,
    ODD,
    feed,
    make_learner,
    metrics_of,
    model_of,
    some_photos,
    train,
    weights,
)

COUNTS = (16, 21, 17)  # of photos: even; uneven; a replica without a real photo


class Passes(NamedTuple):
    """What training leaves: one pass over each of COUNTS photos, one after another."""

    losses: list[list[float]]
    weights: list[np.ndarray]
    photos: float  # that the tally counted
    evaluations: list[Metrics]


@functools.cache
def passes(replicas: int, xla: bool) -> Passes:
    """Training with clipping, weight decay and a penalty."""
    learner = make_learner(ODD, replicas, xla=xla)
    losses, evaluations = [], []
    for count in COUNTS:
        examples = some_photos(count)
        losses.append(train(learner, examples, 8))
        evaluations.append(learner.evaluate(feed(learner, examples, 8)))
    return Passes(
        losses, weights(learner), float(learner.state.tally.read()["weight"]), evaluations
    )


@pytest.mark.parametrize(("replicas", "xla"), [(2, True), (3, False)])
def test_several_devices_give_what_one_gives(replicas, xla):
    """Compiled by XLA too."""
    one, many = passes(1, xla=False), passes(replicas, xla)
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
    ("size", "photos", "unfreeze_from", "accumulate_steps"),
    [(5, 11, "0", 1), (4, 21, "stage3_block1_2_bn", 2)],
)
def test_synchronised_batch_norm_gives_what_one_device_gives(
    size, photos, unfreeze_from, accumulate_steps
):
    """Also where two does not divide the batch, or a device has no photo."""
    config = dataclasses.replace(
        CONFIG,
        bn_mode="sync",
        unfreeze_from=unfreeze_from,
        batch_size=size,
        accumulate_steps=accumulate_steps,
    )
    one, many = make_learner(config), make_learner(config, 2)
    before = weights(one)
    examples = some_photos(photos)
    np.testing.assert_allclose(train(one, examples, size), train(many, examples, size), rtol=1e-4)
    moved = 0.0
    for start, single, mirrored in zip(before, weights(one), weights(many), strict=True):
        np.testing.assert_allclose(single, mirrored, rtol=1e-3, atol=1e-4)
        moved = max(moved, np.abs(single - start).max(initial=0))
    assert moved > 0.05  # far more than the tolerance


def first_means(learner: Learner) -> list[np.ndarray]:
    """The moving mean of the first trained BatchNorm, or of the first one, on each device."""
    norms = [
        layer
        for layer in model_of(learner).backbone.layers
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    norm = next((norm for norm in norms if norm.trainable), norms[0])
    copies = learner.strategy.experimental_local_results(norm.moving_mean.value)
    return [copy.numpy() for copy in copies]


def test_batch_norm_that_is_not_synchronised_sees_its_devices_photos():
    """Two devices of four photos each do what one does with two batches of four.

    A device without photos keeps its statistics.
    """
    config = dataclasses.replace(CONFIG, bn_mode="train", unfreeze_from="stage3")
    two = make_learner(config, 2)
    one = make_learner(dataclasses.replace(config, accumulate_steps=2))
    means, losses = [], []
    for batch in feed(two, some_photos(17), 8):  # the last step: no photo for the second device
        two.train_step(batch)
        losses.append(metrics_of(two).loss)
        means.append(first_means(two))
    np.testing.assert_allclose(train(one, some_photos(17), 4), losses, rtol=1e-4)
    for single, mirrored in zip(
        model_of(one).trainable_variables, model_of(two).trainable_variables, strict=True
    ):
        np.testing.assert_allclose(single.numpy(), mirrored.numpy(), rtol=1e-3, atol=1e-4)
    first, second, third = means
    changed = [not np.array_equal(a, b) for a, b in zip(first, second, strict=True)]
    assert changed == [True, True]
    changed = [not np.array_equal(a, b) for a, b in zip(second, third, strict=True)]
    assert changed == [True, False]
    assert all(np.isfinite(value).all() for value in weights(two))


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


@pytest.mark.parametrize(("path", "bn_mode"), [((2, 1), "train"), ((1, 2), "frozen")])
def test_a_run_goes_on_with_another_number_of_devices(path, bn_mode, tmp_path):
    """Losses after the change are those of the run that stayed.

    Statistics learned on several devices are averaged: what is evaluated on two devices is what
    their checkpoint gives one.
    """
    config = dataclasses.replace(
        CONFIG, bn_mode=bn_mode, head_optimizer="adam", backbone_optimizer="rmsprop"
    )
    config = dataclasses.replace(config, head_learning_rate=1e-3, backbone_learning_rate=1e-4)
    examples = some_photos(21)
    first, second = (make_learner(config, replicas) for replicas in path)
    train(first, examples, 8)
    learned = first_means(first)
    assert not any(np.array_equal(learned[0], other) for other in learned[1:])
    first.average_statistics()
    for mean in first_means(first):
        np.testing.assert_allclose(mean, np.mean(learned, axis=0), rtol=1e-6)
    path = make_checkpoint(model_of(first), first.groups, first.state).save(str(tmp_path / "step"))
    make_checkpoint(model_of(second), second.groups, second.state).restore(path).assert_consumed()
    losses = [learner.evaluate(feed(learner, examples, 8)).loss for learner in (first, second)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert second.state.current_step == 3
    stayed = train(first, examples, 8)
    # BatchNorm in mode `train` sees each device's photos alone: close, but not the same.
    tolerance = 1e-4 if bn_mode == "frozen" else 0.1
    np.testing.assert_allclose(stayed, train(second, examples, 8), rtol=tolerance)
