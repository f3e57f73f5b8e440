from __future__ import annotations

import collections
import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

from research.data.split_arrays import SplitArrays
from research.loop.builder import build_network, make_groups
from research.loop.learner import Learner
from research.loop.plan import make_plan
from research.loop.run_state import RunState, make_checkpoint
from research.optimization.groups import check_partition, make_group
from research.optimization.schedules import Schedule
from research.runs.event_files import EventFiles
from research.runs.histograms import Histograms
from tests.learners import (
    CONFIG,
    ODD,
    SHAPES,
    TASK,
    feed,
    make_learner,
    metrics_of,
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
    np.testing.assert_allclose(metrics_of(learner).loss, loss, rtol=1e-5)
    head = [g for g, rate in zip(gradients, rates, strict=True) if rate == 0.5]
    np.testing.assert_allclose(norms["gradient_norm/head"], tf.linalg.global_norm(head), rtol=1e-5)
    assert learner.state.current_step == 1


@pytest.mark.parametrize("accumulate_steps", [1, 2])
def test_a_step_that_xla_compiles_as_a_whole_makes_the_same_update(accumulate_steps):
    settings = {"clip_norm": 0.5, "head_optimizer": "rmsprop", "bn_mode": "train"}
    config = dataclasses.replace(CONFIG, accumulate_steps=accumulate_steps, **settings)
    plain, compiled = make_learner(config), make_learner(config, xla=True)
    losses = [train(learner, some_photos(13), 8) for learner in (plain, compiled)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    for one, other in zip(weights(compiled), weights(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert compiled.state.current_step == plain.state.current_step == len(losses[0])
    assert is_compiled_as_a_whole(compiled) and not is_compiled_as_a_whole(plain)


def is_compiled_as_a_whole(learner: Learner) -> bool:
    batch = next(iter(feed(learner, some_photos(8), 8)))
    try:
        return bool(learner._train_step.experimental_get_compiler_ir(batch)(stage="hlo"))
    except ValueError:  # not compiled by XLA
        return False


def test_xla_compiles_the_passes_of_a_step_with_histograms(tmp_path):
    plain, learner = make_learner(CONFIG), make_learner(CONFIG, xla=True)
    files = EventFiles(tmp_path)
    with_histograms = Learner(
        *(learner.strategy, learner.task, learner.network, learner.groups, learner.state),
        options=learner.options,
        histograms=Histograms(files, every=1),
    )
    losses = [train(one, some_photos(16), 8) for one in (plain, with_histograms)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert not is_compiled_as_a_whole(with_histograms)


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
    assert metrics_of(padded).photos == 5


def gradients_by_hand(learner: Learner, examples: SplitArrays) -> list[np.ndarray]:
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
    model.head.bias.assign([0.3])  # decay would do nothing to a bias of 0
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


def head_alone(learner: Learner) -> Learner:
    return Learner(learner.strategy, TASK, learner.network, learner.groups[:1], learner.state)


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
    stray = make_group(
        "stray", frozen, keras.optimizers.SGD, Schedule("constant", 1, 0, 1), learner.state.step
    )
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


def test_head_alone_leaves_the_statistics_of_batch_norm_as_they_were():
    learner = make_learner(dataclasses.replace(CONFIG, bn_mode="train", head_epochs=1))
    before = [variable.numpy() for variable in model_of(learner).backbone.variables]
    (batch,) = feed(learner, some_photos(8), 8)
    head_alone(learner).train_step(batch)
    for variable, value in zip(model_of(learner).backbone.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def test_more_than_two_classes():
    keras.utils.set_random_seed(0)
    network = build_network(CONFIG, tuple("abcde")).network
    state = RunState(SHAPES)
    groups = make_groups(CONFIG, network.model, state.step, make_plan(CONFIG, 16))
    learner = Learner(tf.distribute.get_strategy(), TASK, network, groups, state)
    examples = some_photos(16, classes=5)
    logits = network.model(scale(tf.cast(examples.inputs[0][:8], tf.float32))).numpy()
    assert logits.shape == (8, 5)
    log_softmax = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -log_softmax[np.arange(8), examples.labels[:8]].mean()
    assert train(learner, examples, 8)[0] == pytest.approx(expected, rel=1e-4)
    assert learner.evaluate(feed(learner, examples, 8)).photos == 16
