from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from research.batches import epoch_order, make_batches, pad_batch
from research.examples import Examples


def some_examples(count: int) -> Examples:
    pixels = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    names = tuple(str(index) for index in range(count))
    return Examples((pixels,), np.arange(count, dtype=np.int32) % 2, names)


@pytest.mark.parametrize("window", [1, 2, 10, 50, 1000])
def test_each_example_comes_once_an_epoch(window):
    order = epoch_order(50, window, seed=0, epoch=0)
    np.testing.assert_array_equal(np.sort(order), np.arange(50))


def test_order_follows_from_seed_and_epoch():
    first = epoch_order(100, 10, seed=0, epoch=0)
    np.testing.assert_array_equal(first, epoch_order(100, 10, seed=0, epoch=0))
    assert not np.array_equal(first, epoch_order(100, 10, seed=0, epoch=1))
    assert not np.array_equal(first, epoch_order(100, 10, seed=1, epoch=0))


def test_window_of_one_keeps_the_order_and_a_window_limits_how_early_an_example_comes():
    np.testing.assert_array_equal(epoch_order(20, 1, 0, 0), np.arange(20))
    order = epoch_order(1000, 30, 0, 0)
    assert np.all(order - np.arange(1000) < 30)
    assert np.abs(order - np.arange(1000)).max() > 30  # late ones may wait longer


def test_a_large_window_shuffles_everything():
    order = epoch_order(1000, 1000, 0, 0)
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1


def test_batches_hold_what_their_docstring_says():
    examples = some_examples(10)
    order = np.array([3, 1, 4, 0, 9])
    batches = list(make_batches(examples, order, 2, lambda image: image / 255.0))
    assert [batch["label"].shape[0] for batch in batches] == [2, 2, 1]
    for batch in batches:
        assert batch["image"].dtype == tf.float32
        assert batch["label"].dtype == tf.int32
        np.testing.assert_array_equal(batch["weight"], 1.0)
    seen = np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches])
    np.testing.assert_allclose(seen * 255, order, rtol=1e-6)
    labels = np.concatenate([batch["label"] for batch in batches])
    np.testing.assert_array_equal(labels, order % 2)


def test_several_inputs_come_unchanged_side_by_side():
    inputs = (np.random.rand(4, 2, 2, 5).astype("f4"), np.random.rand(4, 3).astype("f4"))
    examples = Examples(inputs, np.zeros(4, np.int32), tuple("abcd"))
    (batch,) = make_batches(examples, np.array([2, 0, 3]), 3, None)
    np.testing.assert_array_equal(batch["image"][0], inputs[0][[2, 0, 3]])
    np.testing.assert_array_equal(batch["image"][1], inputs[1][[2, 0, 3]])


def test_padding_repeats_real_examples_that_weigh_nothing():
    (batch,) = make_batches(some_examples(3), np.arange(3), 8, None)
    padded = pad_batch(batch, 8)
    np.testing.assert_array_equal(padded["weight"], [1, 1, 1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(padded["image"][:, 0, 0, 0], [0, 1, 2, 0, 1, 2, 0, 1])
    assert padded["label"].shape == (8,)


def test_padding_leaves_a_full_batch_as_it_is():
    (batch,) = make_batches(some_examples(4), np.arange(4), 4, None)
    padded = pad_batch(batch, 4)
    tf.nest.map_structure(np.testing.assert_array_equal, padded, batch)
