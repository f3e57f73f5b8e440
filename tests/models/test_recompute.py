"""Activations computed again in the backward pass: the same gradients, for more computation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import context

from research.loop.builder import build_network
from research.loop.steps import Network
from research.models import recompute, split
from research.models.recompute import cut_into_blocks
from research.settings.train_config import TrainConfig
from research.system.devices import set_precision
from research.tasks.task import Gradients, Task
from tests.helpers import SMALL_RUN, randomize_head, run_script
from tests.learners import ODD, make_learner, some_photos, train, weights

CONFIG = dataclasses.replace(ODD, recompute="blocks")


def some_batch(count: int = 4) -> dict[str, tf.Tensor]:
    examples = some_photos(count)
    image = tf.cast(examples.inputs[0], tf.float32) / 127.5 - 1
    return {"image": image, "label": tf.constant(examples.labels), "weight": tf.ones(count)}


def make_network(config: TrainConfig) -> Network:
    network = build_network(config, ("cat", "dog")).network
    randomize_head(network.model)
    return network


def without_blocks(network: Network) -> Network:
    return dataclasses.replace(network, parts=dataclasses.replace(network.parts, blocks=()))


def compiled(
    network: Network,
    batch: dict[str, tf.Tensor],
    values: Sequence[tf.Tensor] | None = None,
    xla: bool = False,
) -> Callable[[], Gradients]:
    variables = network.model.trainable_variables

    @tf.function(autograph=False, jit_compile=xla)
    def compute() -> Gradients:
        return Task().gradients(network, batch, variables, 1.0, values)

    return compute


def gradients_of(
    network: Network,
    batch: dict[str, tf.Tensor],
    values: Sequence[tf.Tensor] | None = None,
    xla: bool = False,
) -> Gradients:
    return compiled(network, batch, values, xla)()


def assert_equal_gradients(one: Gradients, other: Gradients) -> None:
    np.testing.assert_allclose(one.sums["loss"], other.sums["loss"], rtol=1e-6)
    for first, second in zip(one.values, other.values, strict=True):
        largest = np.abs(first).max()
        np.testing.assert_allclose(second, first, rtol=1e-5, atol=1e-5 * largest)


def counters(network: Network) -> list[keras.Variable]:
    """The states of random layers."""
    return [
        variable
        for variable in network.model.non_trainable_variables
        if variable.path.endswith("seed_generator_state")
    ]


def test_a_residual_network_has_the_same_gradients():
    """Also at other values of the variables, and compiled by XLA."""
    network = make_network(dataclasses.replace(CONFIG, unfreeze_from="0"))
    plain, batch = without_blocks(network), some_batch()
    assert len(network.parts.blocks) > 2
    expected = gradients_of(plain, batch)
    assert all(np.abs(value).max() > 0 for value in expected.values)
    assert_equal_gradients(expected, gradients_of(network, batch))
    assert_equal_gradients(expected, gradients_of(network, batch, xla=True))
    above = [variable.value * 1.1 for variable in network.model.trainable_variables]
    moved = gradients_of(plain, batch, above)
    assert_equal_gradients(moved, gradients_of(network, batch, above))
    assert abs(moved.sums["loss"] - expected.sums["loss"]) > 1e-3


def test_blocks_begin_at_a_cut_where_several_tensors_cross(monkeypatch):
    """Outside `tf.function`, too."""
    monkeypatch.setattr(split, "MAX_LAYERS_TO_REPEAT", 0)
    network = make_network(dataclasses.replace(CONFIG, unfreeze_from="stage2_block1_2_relu"))
    assert len(network.parts.crossing) == 2
    variables, batch = network.model.trainable_variables, some_batch()
    plain = Task().gradients(without_blocks(network), batch, variables, 1.0)
    assert_equal_gradients(plain, Task().gradients(network, batch, variables, 1.0))


def test_random_layers_draw_the_same_numbers_again():
    """Stochastic depth: each step draws new numbers, and both passes of a step the same ones."""
    name = "EfficientNetV2B0"
    network = make_network(
        dataclasses.replace(CONFIG, backbone=name, unfreeze_from="block6f_expand_conv")
    )
    network = dataclasses.replace(network, input_kind="activations")
    assert len(network.parts.blocks) > 2
    batch = some_batch()
    batch["image"] = network.parts.activations(batch["image"])
    states = counters(network)
    before = [state.numpy() for state in states]
    expected = gradients_of(without_blocks(network), batch)
    after = [state.numpy() for state in states]
    assert any(not np.array_equal(*pair) for pair in zip(before, after, strict=True))
    for state, value in zip(states, before, strict=True):
        state.assign(value)
    compute = compiled(network, batch)
    assert_equal_gradients(expected, compute())
    np.testing.assert_array_equal([state.numpy() for state in states], after)
    assert abs(compute().sums["loss"] - expected.sums["loss"]) > 1e-6


@pytest.mark.parametrize(
    ("replicas", "settings", "xla"),
    [(2, {"accumulate_steps": 2}, False), (1, {"precision": "float16"}, False), (1, {}, True)],
)
def test_steps_give_the_weights_that_they_give_without(replicas, settings, xla):
    """On two devices, with accumulated batches, a loss scale, decay and a penalty."""
    config = dataclasses.replace(CONFIG, **settings)
    set_precision(config.precision)
    try:
        plain = make_learner(dataclasses.replace(config, recompute="none"), replicas, xla=xla)
        learner = make_learner(config, replicas, xla=xla)
        before, examples = weights(plain), some_photos(11)
        losses = train(plain, examples, 4)
        np.testing.assert_allclose(losses, train(learner, examples, 4), rtol=1e-5)
    finally:
        set_precision("float32")
    assert learner.network.parts.blocks
    assert learner.state.loss_scale.read() == plain.state.loss_scale.read()
    tolerance = 2e-3 if settings.get("precision") == "float16" else 1e-5
    moved = 0.0
    for start, one, other in zip(before, weights(plain), weights(learner), strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)
        moved = max(moved, np.abs(one - start).max(initial=0))
    assert moved > 0.01


def convolutions(network: Network, batch: dict[str, tf.Tensor]) -> int:
    """The forward convolutions that TensorFlow computes for the gradients after optimization."""
    compute = compiled(network, batch)
    context.enable_run_metadata()
    try:
        compute()
        graphs = context.export_run_metadata().partition_graphs
    finally:
        context.disable_run_metadata()
    names = [
        node.op
        for graph in graphs
        for nodes in (graph.node, *(function.node_def for function in graph.library.function))
        for node in nodes
    ]
    return sum("Conv2D" in name and "Backprop" not in name for name in names)


def test_the_optimizer_of_tensorflow_does_not_undo_it(monkeypatch):
    """It would, if nothing told it that the second pass begins after a gradient."""
    network = make_network(dataclasses.replace(CONFIG, unfreeze_from="0"))
    batch = some_batch()
    once = convolutions(without_blocks(network), batch)
    assert convolutions(network, batch) >= once + len(network.parts.blocks) - 1
    monkeypatch.setattr(recompute, "_zero_after", lambda tensor: tf.zeros([], tensor.dtype))
    assert convolutions(network, batch) == once


def test_blocks_compute_the_model_and_need_less_memory():
    images = keras.Input((8, 8, 4))
    values = images
    for index in range(16):
        inner = keras.layers.Conv2D(16, 1, name=f"wide{index}")(values)
        values = keras.layers.Conv2D(4, 1, name=f"narrow{index}")(inner) + values
    model = keras.Model(images, values)
    blocks = cut_into_blocks(model)
    assert 2 < len(blocks) < 16
    assert {block.output_shape[-1] for block in blocks} == {4}  # cut at narrow places
    assert [layer.name for block in blocks for layer in block.layers if "wide" in layer.name] == [
        f"wide{index}" for index in range(16)
    ]
    batch = found = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
    for block in blocks:
        found = block(found)
    np.testing.assert_allclose(found, model(batch), rtol=1e-6)


def test_a_single_layer_is_not_cut():
    images = keras.Input((8, 8, 4))
    model = keras.Model(images, keras.layers.Conv2D(4, 1)(images))
    assert cut_into_blocks(model) == (model,)


def test_a_run_says_that_nothing_is_recomputed_if_only_the_head_is_trained(photo_folder, tmp_path):
    flags = [*SMALL_RUN, f"--image_folder={photo_folder}", "--ckpt_dir=run", "--epochs=1"]
    flags += ["--unfreeze_from=none", "--steps_per_epoch=1", "--recompute=blocks"]
    process = run_script(tmp_path, "run_train.py", *flags)
    assert process.returncode == 0, process.stderr
    assert "note: --recompute=blocks has no effect" in process.stdout
