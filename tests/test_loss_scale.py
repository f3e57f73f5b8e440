"""Tests of the loss scale alone, and in float16 training steps on one and two devices."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import keras
import numpy as np
import pytest
import tensorflow as tf

from research.loop.finite_check import TrainingDivergedError, check_finite, read_scalars
from research.loop.learning_rate_finder import sweep_rates
from research.loop.plan import make_plan
from research.optimization import loss_scale
from research.optimization.loss_scale import LossScale
from research.optimization.schedules import Rising
from research.runs.logbook import Records
from research.system import devices as runtime
from tests.learners import (
    CONFIG,
    feed,
    make_learner,
    model_of,
    some_photos,
    train,
    weights,
)

SMALL = dataclasses.replace(
    CONFIG,
    unfreeze_from="stage3",
    head_optimizer="adam",
    head_learning_rate=1e-3,
    backbone_optimizer="adam",
    backbone_learning_rate=1e-3,
)


@pytest.fixture(params=["float16", "bfloat16"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    runtime.set_precision(request.param)
    yield request.param
    runtime.set_precision("float32")


@pytest.fixture
def float16() -> Iterator[None]:
    runtime.set_precision("float16")
    yield
    runtime.set_precision("float32")


def test_the_scale_halves_after_an_overflow_and_doubles_after_2000_good_steps():
    scale = LossScale(active=True)
    assert scale.read() == (2.0**15, 0)
    scale.update(tf.constant(False))
    assert scale.read() == (2.0**14, 1)
    for _ in range(loss_scale.STEPS_TO_DOUBLE - 1):
        scale.update(tf.constant(True))
    assert scale.read() == (2.0**14, 1)
    scale.update(tf.constant(True))
    assert scale.read() == (2.0**15, 1)
    assert int(scale.good_steps) == 0


def test_good_steps_are_counted_from_the_last_overflow():
    scale = LossScale(active=True)
    scale.good_steps.assign(loss_scale.STEPS_TO_DOUBLE - 1)
    scale.update(tf.constant(False))
    scale.update(tf.constant(True))
    assert scale.read() == (2.0**14, 1)


def test_low_precision_trains_like_float32(precision):
    examples = some_photos(24)
    low = make_learner(SMALL)
    if precision == "float16":
        low.state.loss_scale.scale.assign(2.0**8)  # the initial scale skips two steps
    losses = train(low, examples, 8)
    assert low.network.parts.rest.output.dtype == precision
    assert low.state.loss_scale.active == (precision == "float16")
    assert low.state.loss_scale.read().skipped_steps == 0
    assert all(variable.dtype == "float32" for variable in model_of(low).trainable_variables)
    runtime.set_precision("float32")
    high = make_learner(SMALL)
    np.testing.assert_allclose(losses, train(high, examples, 8), rtol=2e-2)
    for one, other in zip(weights(low), weights(high), strict=True):
        # The size of Adam's first steps does not depend on the gradient: 3 steps of 0.001.
        np.testing.assert_allclose(one, other, atol=0.0061)


def test_applied_gradients_do_not_contain_the_scale(float16):
    """Compares gradients, because Adam's updates hardly depend on their scale."""
    (batch,) = feed(low := make_learner(SMALL), some_photos(8), 8)
    low.state.loss_scale.scale.assign(2.0**8)
    found = low.train_step(batch)
    runtime.set_precision("float32")
    expected = make_learner(SMALL).train_step(batch)
    for name in ("gradient_norm/head", "gradient_norm/backbone"):
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-2)


def test_the_head_and_the_loss_are_float32(precision):
    learner = make_learner(SMALL)
    (batch,) = feed(learner, some_photos(8), 8)
    logits = learner.network.logits(batch, training=True)
    assert logits.dtype == tf.float32
    assert learner.state.tally.variable.dtype == tf.float64


def test_the_learning_rate_finder_ignores_skipped_steps(float16):
    learner = make_learner(SMALL)
    learner.state.loss_scale.scale.assign(2.0**30)  # halved until gradients no longer overflow
    batches = itertools.cycle(feed(learner, some_photos(16), 8))
    sweep = sweep_rates(learner, Rising(1e-7, 1e-6, 0, 24), batches)
    skipped = learner.state.loss_scale.read().skipped_steps
    assert skipped > 5
    assert len(sweep.rates) == 24 - skipped
    assert min(sweep.losses) > 0.3


@pytest.mark.parametrize("replicas", [1, 2])
def test_an_overflow_on_one_device_skips_the_step_on_all(float16, replicas):
    """Weights and optimizers do not change; the step advances, and the scale is halved."""
    learner = make_learner(dataclasses.replace(SMALL, bn_mode="train"), replicas, xla=True)
    learner.state.loss_scale.scale.assign(2.0**8)
    examples = some_photos(16)
    factors = np.ones((8, 1, 1, 1), "f4")
    factors[5] = 1e6  # a photo of the last device
    first, second = feed(learner, examples, 8)
    learner.train_step(first)
    optimizers = [group.optimizer for group in learner.groups]

    def state() -> list[np.ndarray]:
        held = [v for optimizer in optimizers for v in optimizer.variables]
        return [v.numpy() for v in (*model_of(learner).trainable_variables, *held)]

    def on_all_devices() -> list[list[np.ndarray]]:
        return [
            [value.numpy() for value in learner.strategy.experimental_local_results(v.value)]
            for v in model_of(learner).variables
        ]

    before, sums = state(), learner.state.tally.read()
    assert learner.state.loss_scale.read() == (2.0**8, 0)

    learner.train_step(poison(learner, second, tf.constant(factors)))

    for one, other in zip(before, state(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert learner.state.loss_scale.read() == (2.0**7, 1)
    assert learner.state.current_step == 2
    assert learner.state.tally.read() == sums  # a skipped step is in no sum
    assert all(np.isfinite(value).all() for copies in on_all_devices() for value in copies)

    learner.train_step(second)
    assert learner.state.loss_scale.read() == (2.0**7, 1)
    assert learner.state.current_step == 3
    assert learner.state.tally.read()["weight"] == sums["weight"] + 8
    assert [int(optimizer.iterations.numpy()) for optimizer in optimizers] == [2, 2]
    assert not any(np.array_equal(b, a) for b, a in zip(before[:2], state()[:2], strict=True))
    trained = [v.value for v in model_of(learner).trainable_variables]
    for variable in trained:
        copies = learner.strategy.experimental_local_results(variable)
        for copy in copies[1:]:
            np.testing.assert_array_equal(copies[0].numpy(), copy.numpy())


def poison(learner, batch, factors: tf.Tensor):
    """Multiplies the photos of a step by factors, on each device."""
    replicas = learner.strategy.num_replicas_in_sync

    def on_replica(part):
        index = tf.distribute.get_replica_context().replica_id_in_sync_group
        own = tf.reshape(factors, (replicas, -1, 1, 1, 1))[index]
        return {**part, "image": part["image"] * own}

    return learner.strategy.run(on_replica, (batch,))


def test_a_scale_that_keeps_falling_is_a_divergence():
    runtime.set_precision("float16")
    try:
        learner = make_learner(dataclasses.replace(SMALL, unfreeze_from="none"))
    finally:
        runtime.set_precision("float32")
    norm = {"gradient_norm/head": tf.constant(np.inf)}
    figures = read_scalars(learner, 1, norm)
    assert "gradient_norm/head" not in figures
    assert figures["loss_scale"] == 2.0**15
    logbook = Records(make_plan(SMALL, 24))
    check_finite(1, logbook, figures)
    learner.state.loss_scale.scale.assign(0.5)
    with pytest.raises(TrainingDivergedError, match="the loss_scale became 0"):
        check_finite(1, logbook, read_scalars(learner, 1, norm))


def test_other_formats_have_no_scale():
    learner = make_learner(SMALL)
    assert not learner.state.loss_scale.active
    train(learner, some_photos(8), 8)
    assert learner.state.loss_scale.read() == (1.0, 0)
    assert keras.config.dtype_policy().compute_dtype == "float32"
