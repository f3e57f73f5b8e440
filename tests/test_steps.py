from __future__ import annotations

import dataclasses
import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from research import runtime
from research.batches import make_batches
from research.checkpoint import restore_model
from research.config import TrainConfig
from research.examples import Examples
from research.learner import Learner, RunState, build_network, make_checkpoint, make_groups
from research.metrics import mean_metrics
from research.optimizers import check_partition, make_group
from research.plan import make_plan
from research.schedules import Schedule
from research.trunk_cache import cache_trunk

CONFIG = TrainConfig(
    backbone="SmallResNet",
    weights="none",
    unfreeze_from="stage2",
    image_size=32,
    batch_size=8,
    epochs=2,
    head_optimizer="sgd",
    head_learning_rate=0.5,
    backbone_optimizer="sgd",
    backbone_learning_rate=0.01,
    trunk_cache="off",
)


def some_photos(count: int, classes: int = 2) -> Examples:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    labels = generator.integers(classes, size=count).astype(np.int32)
    return Examples((pixels,), labels, tuple(map(str, range(count))))


def scale(image: tf.Tensor) -> tf.Tensor:
    return image / 127.5 - 1


def some_batches(examples: Examples, size: int, preprocessing=scale) -> tf.data.Dataset:
    return make_batches(examples, np.arange(len(examples)), size, preprocessing)


@functools.cache
def mirrored(replicas: int) -> tf.distribute.Strategy:
    """A process bears one strategy that reduces by collectives; four devices do without."""
    devices = [f"CPU:{index}" for index in range(replicas)]
    reduction = tf.distribute.ReductionToOneDevice() if replicas > 2 else None
    return tf.distribute.MirroredStrategy(devices, reduction)


def make_learner(config: TrainConfig, replicas: int = 1, photos: int = 20) -> Learner:
    """A learner whose initial weights depend on nothing but the config's seed."""
    keras.utils.set_random_seed(config.seed)
    strategy = mirrored(replicas) if replicas > 1 else tf.distribute.get_strategy()
    with strategy.scope():
        network = build_network(config, 2).network
        state = RunState()
        groups = make_groups(config, network.model, state.step, make_plan(config, photos))
    return Learner(strategy, network, groups, state)


def model_of(learner: Learner):
    return learner.network.model


def weights(learner: Learner) -> list[np.ndarray]:
    return [variable.numpy() for variable in model_of(learner).variables]


def train(learner: Learner, examples: Examples, size: int) -> list[float]:
    """Trains one pass and returns the mean loss after each step."""
    losses = []
    for batch in runtime.feed(some_batches(examples, size), size, learner.strategy):
        learner.train_step(batch)
        losses.append(mean_metrics(learner.state.tally.read()).loss)
    return losses


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

    (batch,) = runtime.feed(some_batches(examples, 8), 8, learner.strategy)
    norms = learner.train_step(batch)

    for variable, value in zip(trained, expected, strict=True):
        np.testing.assert_allclose(variable.numpy(), value, rtol=1e-5, atol=1e-6)
    for variable, value in zip(model.non_trainable_variables, frozen, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    np.testing.assert_allclose(mean_metrics(learner.state.tally.read()).loss, loss, rtol=1e-5)
    head = [g for g, rate in zip(gradients, rates, strict=True) if rate == 0.5]
    np.testing.assert_allclose(norms["head"], tf.linalg.global_norm(head), rtol=1e-5)
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
    (batch,) = runtime.feed(some_batches(examples, 8), 8, learner.strategy)
    learner.train_step(batch)
    expected = -1e-3 * gradient / np.sqrt(0.1 * gradient**2 + 1e-7)
    np.testing.assert_allclose(bias.numpy(), [expected], rtol=1e-4)


def test_padding_does_not_move_the_weights():
    """Five photos padded to eight make the update of five photos."""
    padded, exact = make_learner(CONFIG), make_learner(CONFIG)
    for learner, size in ((padded, 8), (exact, 5)):
        (batch,) = runtime.feed(some_batches(some_photos(5), size), size, learner.strategy)
        learner.train_step(batch)
    for one, other in zip(weights(padded), weights(exact), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert mean_metrics(padded.state.tally.read()).photos == 5


@pytest.mark.parametrize("replicas", [2, 4])
@pytest.mark.parametrize("photos", [16, 21, 17])  # even; uneven; a replica without a real photo
def test_several_devices_give_what_one_gives(replicas, photos):
    one, many = make_learner(CONFIG), make_learner(CONFIG, replicas)
    examples = some_photos(photos)
    np.testing.assert_allclose(train(one, examples, 8), train(many, examples, 8), rtol=1e-5)
    for single, mirrored in zip(weights(one), weights(many), strict=True):
        np.testing.assert_allclose(single, mirrored, rtol=1e-4, atol=1e-5)
    assert one.state.tally.read().weight == many.state.tally.read().weight == photos

    def evaluated(learner):
        return learner.evaluate(runtime.feed(some_batches(examples, 8), 8, learner.strategy))

    assert evaluated(one).photos == evaluated(many).photos == photos
    np.testing.assert_allclose(evaluated(one).loss, evaluated(many).loss, rtol=1e-5)
    assert evaluated(one).accuracy == evaluated(many).accuracy


def test_a_batch_that_no_number_of_devices_divides_counts_each_photo_once():
    learner = make_learner(dataclasses.replace(CONFIG, batch_size=5), 2)
    train(learner, some_photos(13), 5)
    assert learner.state.tally.read().weight == 13


def test_synchronised_batch_norm_gives_what_one_device_gives():
    config = dataclasses.replace(CONFIG, bn_mode="sync", unfreeze_from="0")
    one = make_learner(dataclasses.replace(config, bn_mode="train"))
    two = make_learner(config, 2)
    examples = some_photos(16)
    np.testing.assert_allclose(train(one, examples, 8), train(two, examples, 8), rtol=1e-3)
    for single, mirrored in zip(weights(one), weights(two), strict=True):
        np.testing.assert_allclose(single, mirrored, rtol=2e-2, atol=2e-3)


def test_losses_from_the_cached_trunk_are_those_without():
    whole, cached = make_learner(CONFIG), make_learner(CONFIG)
    examples = some_photos(20)
    activations = cache_trunk(cached.network.parts, {"train": examples}, scale, 8)["train"]
    from_trunk = Learner(
        cached.strategy,
        dataclasses.replace(cached.network, from_trunk=True),
        cached.groups,
        cached.state,
    )
    losses = []
    for batch in runtime.feed(some_batches(activations, 8, None), 8, whole.strategy):
        from_trunk.train_step(batch)
        losses.append(mean_metrics(from_trunk.state.tally.read()).loss)
    np.testing.assert_allclose(losses, train(whole, examples, 8), rtol=1e-5)
    for one, other in zip(weights(whole), weights(from_trunk), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_head_alone_leaves_the_backbone_and_its_optimizer_as_they_were():
    learner = make_learner(dataclasses.replace(CONFIG, head_epochs=1, backbone_optimizer="adam"))
    before = [variable.numpy() for variable in model_of(learner).backbone.variables]
    (batch,) = runtime.feed(some_batches(some_photos(8), 8), 8, learner.strategy)
    head = model_of(learner).head.kernel.numpy()
    assert set(learner.train_step(batch, head_alone=True)) == {"head"}
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
    config = dataclasses.replace(CONFIG, head_epochs=1, warmup_steps=4)
    learner = make_learner(config)
    head, backbone = learner.groups
    learner.state.step.assign(4)  # the second of the backbone's warm-up: it begins after 3
    assert float(head.optimizer.learning_rate) == pytest.approx(0.5)
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
        batches = runtime.feed(some_batches(examples, 8), 8, learner.strategy)
        return learner.evaluate(batches).loss

    assert loss(one) == pytest.approx(loss(two), rel=1e-5)


def test_head_alone_leaves_the_statistics_of_batch_norm_as_they_were():
    learner = make_learner(dataclasses.replace(CONFIG, bn_mode="train", head_epochs=1))
    before = [variable.numpy() for variable in model_of(learner).backbone.variables]
    (batch,) = runtime.feed(some_batches(some_photos(8), 8), 8, learner.strategy)
    learner.train_step(batch, head_alone=True)
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
    assert learner.evaluate(some_batches(examples, 8)).photos == 16
