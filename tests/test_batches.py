from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import tensorflow as tf

from research.data.augmentation import AugmentationPipeline, HorizontalFlip
from research.data.batches import make_batches
from research.data.order import Share, continued_order, epoch_order
from research.data.split_arrays import SplitArrays


def some_examples(count: int) -> SplitArrays:
    pixels = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    names = tuple(str(index) for index in range(count))
    return SplitArrays((pixels,), np.arange(count, dtype=np.int32) % 2, names)


@pytest.mark.parametrize("shuffle_size", [1, 2, 10, 50, 1000])
def test_each_example_occurs_once_per_epoch(shuffle_size):
    order = epoch_order(50, shuffle_size, seed=0, epoch=0)
    np.testing.assert_array_equal(np.sort(order), np.arange(50))


def test_the_order_depends_only_on_seed_and_epoch():
    first = epoch_order(100, 10, seed=0, epoch=0)
    np.testing.assert_array_equal(first, epoch_order(100, 10, seed=0, epoch=0))
    assert not np.array_equal(first, epoch_order(100, 10, seed=0, epoch=1))
    assert not np.array_equal(first, epoch_order(100, 10, seed=1, epoch=0))


def test_the_shuffle_buffer_limits_how_early_an_example_comes():
    np.testing.assert_array_equal(epoch_order(20, 1, 0, 0), np.arange(20))
    order = epoch_order(1000, 30, 0, 0)
    assert np.all(order - np.arange(1000) < 30)
    assert np.abs(order - np.arange(1000)).max() > 30  # an example can come much later


def test_a_large_buffer_shuffles_everything():
    order = epoch_order(1000, 1000, 0, 0)
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1


@pytest.mark.parametrize("length", [3, 7, 20])
def test_short_epochs_continue_where_the_previous_one_ended(length):
    epochs = [continued_order(20, 5, 0, epoch, length) for epoch in range(20)]
    assert {len(order) for order in epochs} == {length}
    passes = np.concatenate(epochs).reshape(-1, 20)
    for number, visited in enumerate(passes):
        np.testing.assert_array_equal(visited, epoch_order(20, 5, 0, number))


def test_the_content_of_batches():
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


def test_several_inputs_are_unchanged():
    inputs = (np.random.rand(4, 2, 2, 5).astype("f4"), np.random.rand(4, 3).astype("f4"))
    examples = SplitArrays(inputs, np.zeros(4, np.int32), tuple("abcd"))
    (batch,) = make_batches(examples, np.array([2, 0, 3]), 3, None)
    np.testing.assert_array_equal(batch["image"][0], inputs[0][[2, 0, 3]])
    np.testing.assert_array_equal(batch["image"][1], inputs[1][[2, 0, 3]])


def test_padding_repeats_examples_with_weight_0():
    examples = some_examples(3)
    (batch,) = make_batches(examples, np.arange(3), 8, None, share=Share())
    np.testing.assert_array_equal(batch["weight"], [1, 1, 1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], [0, 1, 2, 0, 1, 2, 0, 1])
    assert batch["label"].shape == (8,)
    # A part that is only padding has different photos, as the statistics of BatchNorm need.
    rows, weights = Share(parts=4).rows(np.arange(5), 4)
    np.testing.assert_array_equal(rows, [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]])
    np.testing.assert_array_equal(weights, [[1] * 5 + [0] * 11])


@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("photos", [1, 5, 16, 23])
def test_the_shares_of_the_devices_form_the_batches_of_one_device(replicas, parts, photos):
    order = np.random.default_rng(0).permutation(photos)
    steps = -(-photos // (5 * parts))
    width = -(-5 // replicas)
    whole = Share(replicas, 0, replicas, parts).rows(order, 5)
    for table in whole:
        assert table.shape == (steps * replicas, parts * width)
    # From (step, device, part, position) to (batch, position).
    indices, weights = (
        table.reshape(steps, replicas, parts, width).swapaxes(1, 2).reshape(steps * parts, -1)
        for table in whole
    )
    for number, (batch, weight) in enumerate(zip(indices, weights, strict=True)):
        np.testing.assert_array_equal(batch[weight > 0], order[5 * number : 5 * number + 5])
    assert set(weights.ravel()) <= {0.0, 1.0}
    for device in range(replicas):
        own = Share(replicas, device, 1, parts).rows(order, 5)
        for table, of_all in zip(own, whole, strict=True):
            np.testing.assert_array_equal(table, of_all[device::replicas])


def test_a_share_without_examples_is_empty():
    indices, weights = Share(2, 0, 2).rows(np.arange(0), 4)
    assert indices.shape == weights.shape == (0, 2)


def test_the_random_numbers_of_an_epoch_are_freed_with_it():
    examples = some_examples(8)
    augmentation = AugmentationPipeline([HorizontalFlip()])
    draws = augmentation.draw(8, seed=0, epoch=0)
    kept = weakref.ref(draws)
    batches = make_batches(
        examples, np.arange(8), 4, None, augmentation=augmentation, numbers=draws
    )
    assert len(list(batches)) == 2
    del draws, batches
    gc.collect()
    assert kept() is None
