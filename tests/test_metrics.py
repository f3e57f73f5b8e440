from __future__ import annotations

import math

import numpy as np
import pytest
import tensorflow as tf

from research.tasks.losses import cross_entropy, predicted_labels
from research.tasks.metrics import Tally, mean_metrics
from research.tasks.task import Task

SHAPES = {"loss": (), "accuracy": (), "weight": ()}


def sums(*values: float) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in zip(SHAPES, values, strict=True)}


def test_loss_of_one_logit_is_the_cross_entropy_of_its_sigmoid():
    logits = np.array([[-3.0], [0.5], [8.0]], np.float32)
    labels = np.array([0, 1, 0])
    probability = 1 / (1 + np.exp(-logits[:, 0].astype(float)))
    expected = -np.log(np.where(labels == 1, probability, 1 - probability))
    np.testing.assert_allclose(cross_entropy(tf.constant(logits), labels), expected, rtol=1e-5)


def test_loss_of_many_logits_is_the_cross_entropy_of_their_softmax():
    logits = np.array([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]], np.float32)
    exponentials = np.exp(logits)
    expected = -np.log(exponentials[[0, 1], [2, 0]] / exponentials.sum(1))
    losses = cross_entropy(tf.constant(logits), tf.constant([2, 0]))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize("logit", [-30.0, -2.0, 2.0, 30.0])
def test_a_wrong_photo_pushes_the_logit_however_sure_it_is(logit):
    """A loss that takes logits for probabilities has no gradient outside (0, 1)."""
    value = tf.constant([[logit]])
    wrong = tf.constant([int(logit < 0)])
    with tf.GradientTape() as tape:
        tape.watch(value)
        loss = tf.reduce_sum(cross_entropy(value, wrong))
    gradient = float(tape.gradient(loss, value)[0, 0])
    assert math.copysign(1, gradient) == math.copysign(1, logit)
    assert abs(gradient) > 0.8


def test_predicted_class_is_that_of_the_larger_probability():
    np.testing.assert_array_equal(predicted_labels(tf.constant([[-0.1], [0.1], [0.6]])), [0, 1, 1])
    np.testing.assert_array_equal(predicted_labels(tf.constant([[0.1, 3.0, 2.0]])), [1])


def test_weightless_examples_do_not_count():
    logits = tf.constant([[4.0], [-4.0], [4.0]])
    batch = {"label": tf.constant([1, 1, 0]), "weight": tf.constant([1.0, 1.0, 0.0])}
    found = Task().sums(logits, batch)
    assert float(found["weight"]) == 2
    assert float(found["accuracy"]) == 1
    expected = math.log1p(math.exp(-4)) + 4 + math.log1p(math.exp(-4))
    np.testing.assert_allclose(found["loss"], expected)
    np.testing.assert_allclose(found["cross_entropy"], expected)


def test_mean_over_uneven_batches_is_that_over_all_photos():
    """The mean of the batch means would be 0.5."""
    tally = Tally(SHAPES)
    for values in ((3.0, 3.0, 3.0), (0.5, 0.0, 1.0)):
        tally.add({name: tf.constant(value) for name, value in zip(SHAPES, values, strict=True)})
    metrics = mean_metrics(tally.read(), Task().figures)
    assert metrics["accuracy"] == 0.75
    assert metrics.loss == pytest.approx(3.5 / 4)
    assert metrics.photos == 4
    tally.reset()
    assert tally.read() == sums(0, 0, 0)


def test_sums_of_any_shape_add_up_by_name():
    tally = Tally({"histogram": (2, 3), "weight": ()})
    for number in (1.0, 2.0):
        tally.add({"weight": tf.constant(number), "histogram": number * tf.ones((2, 3))})
    read = tally.read()
    np.testing.assert_array_equal(read["histogram"], np.full((2, 3), 3.0))
    assert read["weight"] == 3


def test_means_over_nothing_are_nan():
    metrics = mean_metrics(sums(0, 0, 0), Task().figures)
    assert math.isnan(metrics.loss)
    assert math.isnan(metrics["accuracy"])
