from __future__ import annotations

import collections
import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

from research.builder import build_network, make_groups
from research.checkpoint import restore_model
from research.learner import Learner
from research.metrics import mean_metrics
from research.optimizers import check_partition, make_group
from research.photos.examples import Examples
from research.plan import make_plan
from research.run_state import RunState, make_checkpoint
from research.schedules import Schedule
from tests.learners import (
    CONFIG,
    feed,
    make_learner,
    model_of,
    scale,
    some_photos,
    train,
    weights,
)


def test_a_step_is_the_update_written_by_hand():
    """Gradient descent on the mean cross-entropy, each group with a rate of its own."""
    learner = make_learner(CONFIG)
    model = model_of(learner)
    examples = some_photos(8)
    image = scale(tf.cast(examples.inputs[0], tf.float32))
    labels = tf.cast(examples.labels, tf.float32)
    trained = model.trainable_variables
    with tf.GradientTape() as tape:
        logits = model(image, training=False)[:, 0]
        per_photo = tf.math.softplus(logits) - labels * logits
        loss = tf.reduce_mean(per_photo)
    gradients = tape.gradient(loss, [variable.value for variable in trained])
    rates = [0.5 if variable.path.startswith("head") else 0.01 for variable in trained]
    assert {0.5, 0.01} == set(rates)
    expected = [
        variable.numpy() - rate * gradient.numpy()
        for variable, rate, gradient in zip(trained, rates, gradients, strict=True)
    ]
    frozen = [variable.numpy() for variable in model.non_trainable_variables]

    (batch,) = feed(learner, examples, 8)
    norms = learner.train_step(batch)

    for variable, value in zip(trained, expected, strict=True):
        np.testing.assert_allclose(variable.numpy(), value, rtol=1e-5, atol=1e-6)
    for variable, value in zip(model.non_trainable_variables, frozen, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    np.testing.assert_allclose(mean_metrics(learner.state.tally.read()).loss, loss, rtol=1e-5)
    head = [g for g, rate in zip(gradients, rates, strict=True) if rate == 0.5]
    np.testing.assert_allclose(norms["gradient_norm/head"], tf.linalg.global_norm(head), rtol=1e-5)
    assert learner.state.current_step == 1


def test_rmsprop_follows_its_formula():
    config = dataclasses.replace(
        CONFIG, unfreeze_from="none", head_optimizer="rmsprop", head_learning_rate=1e-3
    )
    learner = make_learner(config)
    bias = model_of(learner).head.bias
    examples = some_photos(8)
    logits = model_of(learner)(scale(tf.cast(examples.inputs[0], tf.float32)))[:, 0].numpy()
    gradient = np.mean(1 / (1 + np.exp(-logits)) - examples.labels)
    (batch,) = feed(learner, examples, 8)
    learner.train_step(batch)
    expected = -1e-3 * gradient / np.sqrt(0.1 * gradient**2 + 1e-7)
    np.testing.assert_allclose(bias.numpy(), [expected], rtol=1e-4)


def test_padding_does_not_move_the_weights():
    """Five photos padded to eight make the update of five photos."""
    padded, exact = make_learner(CONFIG), make_learner(CONFIG)
    for learner, size in ((padded, 8), (exact, 5)):
        (batch,) = feed(learner, some_photos(5), size)
        learner.train_step(batch)
    for one, other in zip(weights(padded), weights(exact), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert mean_metrics(padded.state.tally.read()).photos == 5


ODD = dataclasses.replace(
    CONFIG,
    clip_norm=0.5,  # below the first steps' norms: it does something
    weight_decay=0.1,
    l2_penalty=0.01,
)


@pytest.mark.parametrize("replicas", [2, 4])
@pytest.mark.parametrize("photos", [16, 21, 17])  # even; uneven; a replica without a real photo
@pytest.mark.parametrize("config", [CONFIG, ODD], ids=["plain", "clipped, decayed, penalized"])
def test_several_devices_give_what_one_gives(replicas, photos, config):
    one, many = make_learner(config), make_learner(config, replicas)
    examples = some_photos(photos)
    np.testing.assert_allclose(train(one, examples, 8), train(many, examples, 8), rtol=1e-5)
    for single, mirrored in zip(weights(one), weights(many), strict=True):
        np.testing.assert_allclose(single, mirrored, rtol=1e-4, atol=1e-5)
    assert one.state.tally.read().weight == many.state.tally.read().weight == photos

    def evaluated(learner):
        return learner.evaluate(feed(learner, examples, 8))

    assert evaluated(one).photos == evaluated(many).photos == photos
    np.testing.assert_allclose(evaluated(one).loss, evaluated(many).loss, rtol=1e-5)
    assert evaluated(one).accuracy == evaluated(many).accuracy


@pytest.mark.parametrize(
    ("replicas", "size", "photos", "unfreeze_from"),
    [(2, 8, 21, "0"), (2, 8, 17, "stage3"), (2, 5, 13, "stage3"), (4, 8, 17, "stage3_block2_2_bn")],
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
    learner = make_learner(config, 4)
    train(learner, some_photos(2), 2)  # one photo each for two devices, none for the others
    norm = next(
        layer
        for layer in model_of(learner).backbone.layers
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
    )
    means = [value.numpy() for value in norm.moving_mean.value.values]
    assert [np.abs(mean).max() > 0 for mean in means] == [True, True, False, False]
    assert all(np.isfinite(value).all() for value in weights(learner))


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("photos", [24, 21, 9])  # even; a short batch; whole batches missing
def test_accumulated_batches_are_the_large_batch_that_they_stand_for(replicas, photos):
    examples = some_photos(photos)
    whole = make_learner(dataclasses.replace(ODD, batch_size=12))
    parted = make_learner(dataclasses.replace(ODD, batch_size=4, accumulate_steps=3), replicas)
    np.testing.assert_allclose(train(whole, examples, 12), train(parted, examples, 4), rtol=1e-5)
    for one, other in zip(weights(whole), weights(parted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert parted.state.tally.read().weight == photos
    assert whole.state.current_step == parted.state.current_step


def test_accumulated_batches_work_with_synchronised_batch_norm():
    config = dataclasses.replace(CONFIG, bn_mode="sync", unfreeze_from="stage3", accumulate_steps=2)
    one, two = make_learner(config), make_learner(config, 2)
    examples = some_photos(21)
    np.testing.assert_allclose(train(one, examples, 4), train(two, examples, 4), rtol=1e-4)
    for single, mirrored in zip(weights(one), weights(two), strict=True):
        np.testing.assert_allclose(single, mirrored, rtol=1e-3, atol=1e-4)


def gradients_by_hand(learner: Learner, examples: Examples) -> list[np.ndarray]:
    """Of the mean loss over all examples, in the order of `trainable_variables`."""
    model = model_of(learner)
    image = scale(tf.cast(examples.inputs[0], tf.float32))
    labels = tf.cast(examples.labels, tf.float32)
    with tf.GradientTape() as tape:
        logits = model(image, training=False)[:, 0]
        loss = tf.reduce_mean(tf.math.softplus(logits) - labels * logits)
    gradients = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
    return [gradient.numpy() for gradient in gradients]


def test_clipping_decay_and_penalty_follow_their_formulas():
    """w - rate * (clipped gradient of loss and penalty) - rate * decay * w; kernels alone decay."""
    learner = make_learner(ODD)
    model, examples = model_of(learner), some_photos(8)
    trained = model.trainable_variables
    before = [variable.numpy() for variable in trained]
    is_kernel = [len(variable.shape) > 1 for variable in trained]
    assert not all(is_kernel)
    slopes = [
        gradient + (2 * 0.01 * value if kernel else 0)
        for gradient, value, kernel in zip(
            gradients_by_hand(learner, examples), before, is_kernel, strict=True
        )
    ]
    norm = np.sqrt(sum((slope**2).sum() for slope in slopes))
    assert norm > 0.5
    rates = [0.5 if variable.path.startswith("head") else 0.01 for variable in trained]

    (batch,) = feed(learner, examples, 8)
    scalars = learner.train_step(batch)

    for variable, value, slope, rate, kernel in zip(
        trained, before, slopes, rates, is_kernel, strict=True
    ):
        decay = rate * 0.1 * value if kernel else 0
        expected = value - decay - rate * slope * 0.5 / norm
        np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-4, atol=1e-6)
    norms = [scalars[f"gradient_norm/{name}"] for name in ("head", "backbone")]
    np.testing.assert_allclose(np.linalg.norm(norms), norm, rtol=1e-5)  # before clipping
    penalty = sum(
        0.01 * (v**2).sum() for v, kernel in zip(before, is_kernel, strict=True) if kernel
    )
    np.testing.assert_allclose(scalars["penalty"], penalty, rtol=1e-5)


def test_only_what_is_trained_is_differentiated():
    learner = make_learner(dataclasses.replace(CONFIG, unfreeze_from="stage3"))
    (batch,) = feed(learner, some_photos(8), 8)
    graph = learner._train_step.get_concrete_function(batch).graph
    counts = collections.Counter(operation.type for operation in graph.get_operations())
    kernels = [v for v in model_of(learner).backbone.trainable_variables if len(v.shape) == 4]
    assert counts["Conv2DBackpropFilter"] == len(kernels)
    assert counts["Conv2DBackpropInput"] <= len(kernels)  # nothing flows on to the frozen ones


@pytest.mark.parametrize("replicas", [1, 2])
def test_xla_computes_the_same(replicas):
    examples = some_photos(21)
    plain, compiled = make_learner(ODD, replicas), make_learner(ODD, replicas, xla=True)
    np.testing.assert_allclose(train(plain, examples, 8), train(compiled, examples, 8), rtol=1e-4)
    for one, other in zip(weights(plain), weights(compiled), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("path", [(2, 1), (1, 2)])
@pytest.mark.parametrize("bn_mode", ["frozen", "train"])
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


def head_alone(learner: Learner) -> Learner:
    return Learner(learner.strategy, learner.network, learner.groups[:1], learner.state)


def test_head_alone_leaves_the_backbone_and_its_optimizer_as_they_were():
    learner = make_learner(dataclasses.replace(CONFIG, head_epochs=1, backbone_optimizer="adam"))
    alone = head_alone(learner)
    before = [variable.numpy() for variable in model_of(learner).backbone.variables]
    (batch,) = feed(learner, some_photos(8), 8)
    head = model_of(learner).head.kernel.numpy()
    assert set(alone.train_step(batch)) == {"gradient_norm/head"}
    for variable, value in zip(model_of(learner).backbone.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    assert not np.array_equal(model_of(learner).head.kernel.numpy(), head)
    assert int(learner.groups[1].optimizer.iterations) == 0


def test_frozen_variables_hold_no_optimizer_state():
    learner = make_learner(dataclasses.replace(CONFIG, backbone_optimizer="adam"))
    backbone = learner.groups[1]
    trained = sum(int(np.prod(v.shape)) for v in model_of(learner).backbone.trainable_variables)
    held = sum(int(np.prod(v.shape)) for v in backbone.optimizer.variables)
    assert held == 2 * trained + 1  # two moments a weight, and the counter
    assert trained < model_of(learner).backbone.count_params()


def test_each_trainable_variable_must_be_in_exactly_one_group():
    learner = make_learner(CONFIG)
    model, (head, backbone) = model_of(learner), learner.groups
    trainable = model.trainable_variables
    check_partition([head, backbone], trainable)
    with pytest.raises(ValueError, match="in no group; expected exactly one"):
        check_partition([head], trainable)
    with pytest.raises(ValueError, match="in head and head; expected exactly one"):
        check_partition([head, head, backbone], trainable)
    frozen = model.backbone.layers[1].variables
    stray = make_group("stray", frozen, "sgd", Schedule("constant", 1, 0, 1), learner.state.step)
    with pytest.raises(ValueError, match="in group stray, but is not trainable"):
        check_partition([head, backbone, stray], trainable)


def test_both_groups_follow_the_runs_clock_not_their_own():
    config = dataclasses.replace(CONFIG, head_epochs=1, warmup="4steps")
    learner = make_learner(config)
    head, backbone = learner.groups
    learner.state.step.assign(4)  # the second of the backbone's warm-up: it begins after 3
    assert float(head.optimizer.learning_rate) == pytest.approx(1e-4 * 2 / 4)
    assert float(backbone.optimizer.learning_rate) == pytest.approx(0.01 * 2 / 4)


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop", "adam", "adamw", "lion"])
def test_every_optimizer_learns_and_resumes_exactly(optimizer, tmp_path):
    config = dataclasses.replace(
        CONFIG,
        head_optimizer=optimizer,
        backbone_optimizer=optimizer,
        head_learning_rate=1e-3,
        backbone_learning_rate=1e-3,
    )
    examples = some_photos(16)
    learner = make_learner(config)
    first = train(learner, examples, 8)
    checkpoint = make_checkpoint(model_of(learner), learner.groups, learner.state)
    path = checkpoint.save(str(tmp_path / "step"))
    learner.state.tally.reset()
    on = train(learner, examples, 8)
    assert on[-1] < first[-1]

    other = make_learner(dataclasses.replace(config, seed=9))
    make_checkpoint(model_of(other), other.groups, other.state).restore(path).assert_consumed()
    other.state.tally.reset()
    assert train(other, examples, 8) == on
    for one, two in zip(weights(learner), weights(other), strict=True):
        np.testing.assert_array_equal(one, two)


def test_random_layers_go_on_where_they_were(tmp_path):
    """EfficientNet drops paths at random; its counters are no weights, and must be saved too."""
    config = dataclasses.replace(CONFIG, backbone="EfficientNetB0", unfreeze_from="block7")
    examples = some_photos(8)
    learner = make_learner(config)
    train(learner, examples, 8)
    checkpoint = make_checkpoint(model_of(learner), learner.groups, learner.state)
    path = checkpoint.save(str(tmp_path / "step"))
    on = train(learner, examples, 8)
    other = make_learner(config)
    make_checkpoint(model_of(other), other.groups, other.state).restore(path).assert_consumed()
    assert train(other, examples, 8) == on
    for one, two in zip(weights(learner), weights(other), strict=True):
        np.testing.assert_array_equal(one, two)


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


def test_head_alone_leaves_the_statistics_of_batch_norm_as_they_were():
    learner = make_learner(dataclasses.replace(CONFIG, bn_mode="train", head_epochs=1))
    before = [variable.numpy() for variable in model_of(learner).backbone.variables]
    (batch,) = feed(learner, some_photos(8), 8)
    head_alone(learner).train_step(batch)
    for variable, value in zip(model_of(learner).backbone.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def test_more_than_two_classes():
    keras.utils.set_random_seed(0)
    network = build_network(CONFIG, 5).network
    state = RunState()
    groups = make_groups(CONFIG, network.model, state.step, make_plan(CONFIG, 16))
    learner = Learner(tf.distribute.get_strategy(), network, groups, state)
    examples = some_photos(16, classes=5)
    logits = network.model(scale(tf.cast(examples.inputs[0][:8], tf.float32))).numpy()
    assert logits.shape == (8, 5)
    log_softmax = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -log_softmax[np.arange(8), examples.labels[:8]].mean()
    assert train(learner, examples, 8)[0] == pytest.approx(expected, rel=1e-4)
    assert learner.evaluate(feed(learner, examples, 8)).photos == 16
