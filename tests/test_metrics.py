from __future__ import annotations

import math

import numpy as np
import pytest
import tensorflow as tf

from research.metrics import (
    Sums,
    SumsRead,
    Tally,
    example_losses,
    mean_metrics,
    predicted_labels,
    weighted_sums,
)


def test_loss_of_one_logit_is_the_cross_entropy_of_its_sigmoid():
    logits = np.array([[-3.0], [0.5], [8.0]], np.float32)
    labels = np.array([0, 1, 0])
    probability = 1 / (1 + np.exp(-logits[:, 0].astype(float)))
    expected = -np.log(np.where(labels == 1, probability, 1 - probability))
    np.testing.assert_allclose(example_losses(tf.constant(logits), labels), expected, rtol=1e-5)


def test_loss_of_many_logits_is_the_cross_entropy_of_their_softmax():
    logits = np.array([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]], np.float32)
    exponentials = np.exp(logits)
    expected = -np.log(exponentials[[0, 1], [2, 0]] / exponentials.sum(1))
    losses = example_losses(tf.constant(logits), tf.constant([2, 0]))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize("logit", [-30.0, -2.0, 2.0, 30.0])
def test_a_wrong_photo_pushes_the_logit_however_sure_it_is(logit):
    """A loss that takes logits for probabilities has no gradient outside (0, 1)."""
    value = tf.constant([[logit]])
    wrong = tf.constant([int(logit < 0)])
    with tf.GradientTape() as tape:
        tape.watch(value)
        loss = tf.reduce_sum(example_losses(value, wrong))
    gradient = float(tape.gradient(loss, value)[0, 0])
    assert math.copysign(1, gradient) == math.copysign(1, logit)
    assert abs(gradient) > 0.8


def test_predicted_class_is_that_of_the_larger_probability():
    np.testing.assert_array_equal(predicted_labels(tf.constant([[-0.1], [0.1], [0.6]])), [0, 1, 1])
    np.testing.assert_array_equal(predicted_labels(tf.constant([[0.1, 3.0, 2.0]])), [1])


def test_weightless_examples_do_not_count():
    logits = tf.constant([[4.0], [-4.0], [4.0]])
    sums = weighted_sums(logits, tf.constant([1, 1, 0]), tf.constant([1.0, 1.0, 0.0]))
    assert float(sums.weight) == 2
    assert float(sums.correct) == 1
    np.testing.assert_allclose(sums.loss, math.log1p(math.exp(-4)) + 4 + math.log1p(math.exp(-4)))


def test_mean_over_uneven_batches_is_that_over_all_photos():
    """The mean of the batch means would be 0.5."""
    tally = Tally()
    tally.add(Sums(*map(tf.constant, (3.0, 3.0, 3.0))))
    tally.add(Sums(*map(tf.constant, (0.5, 0.0, 1.0))))
    metrics = mean_metrics(tally.read())
    assert metrics.accuracy == 0.75
    assert metrics.loss == pytest.approx(3.5 / 4)
    assert metrics.photos == 4
    tally.reset()
    assert tally.read() == SumsRead(0, 0, 0)


def test_means_over_nothing_are_nan():
    assert math.isnan(mean_metrics(SumsRead(0, 0, 0)).accuracy)
