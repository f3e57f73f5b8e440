"""Tests of the small residual network: shortcut, size and training."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from research.models.backbone import build_backbone
from research.models.backbone_table import find_backbone
from research.models.residual import build_small_resnet, residual_block
from research.system.errors import UserError

pytestmark = pytest.mark.usefixtures("whole_small_resnet")


def block_model(filters: int, stride: int) -> keras.Model:
    """A model of one block whose input is 8 x 8 features with 5 channels."""
    inputs = keras.Input((8, 8, 5))
    return keras.Model(inputs, residual_block(inputs, filters, stride, "block"))


def random_features() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 8, 8, 5)).astype(np.float32)


@pytest.mark.parametrize("training", [False, True])
def test_block_with_zero_residual_is_the_identity(training: bool) -> None:
    model = block_model(filters=5, stride=1)
    kernel = model.get_layer("block_2_conv").kernel
    features = random_features()
    assert not np.array_equal(model(features, training=training), features)
    kernel.assign(tf.zeros_like(kernel))
    np.testing.assert_array_equal(model(features, training=training), features)


def test_identity_shortcut_passes_the_gradient_unchanged() -> None:
    model = block_model(filters=5, stride=1)
    kernel = model.get_layer("block_2_conv").kernel
    kernel.assign(tf.zeros_like(kernel))
    features = tf.constant(random_features())
    with tf.GradientTape() as tape:
        tape.watch(features)
        total = tf.reduce_sum(model(features))
    np.testing.assert_array_equal(tape.gradient(total, features), np.ones((2, 8, 8, 5)))


def test_block_that_changes_the_shape_has_a_convolutional_shortcut() -> None:
    model = block_model(filters=7, stride=2)
    assert model.output_shape == (None, 4, 4, 7)
    assert model.get_layer("block_shortcut_conv").kernel.shape == (1, 1, 5, 7)
    assert "block_shortcut_conv" not in [layer.name for layer in block_model(5, 1).layers]


def test_block_equals_its_formula() -> None:
    model = block_model(filters=7, stride=2)
    for variable in model.weights:
        values = np.random.default_rng(len(variable.path)).uniform(0.5, 1.5, variable.shape)
        variable.assign(values)
    by_name = {layer.name: layer for layer in model.layers}

    def normalized_relu(inputs: tf.Tensor, name: str) -> tf.Tensor:
        bn = by_name[f"{name}_bn"]
        scale = bn.gamma / tf.sqrt(bn.moving_variance + 1e-5)
        return tf.nn.relu((inputs - bn.moving_mean) * scale + bn.beta)

    def convolution(inputs: tf.Tensor, name: str, stride: int) -> tf.Tensor:
        return tf.nn.conv2d(inputs, by_name[f"{name}_conv"].kernel, stride, "SAME")

    features = tf.constant(random_features())
    first = normalized_relu(features, "block_1")
    second = normalized_relu(convolution(first, "block_1", 2), "block_2")
    expected = convolution(first, "block_shortcut", 2) + convolution(second, "block_2", 1)
    np.testing.assert_allclose(model(features), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("size", "reduced"), [(32, 2), (64, 4), (75, 5), (160, 10)])
def test_output_shape(size: int, reduced: int) -> None:
    model = build_small_resnet((size, size, 3), None)
    assert model.output_shape == (None, reduced, reduced, 96)
    assert model(np.zeros((1, size, size, 3), np.float32)).shape == (1, reduced, reduced, 96)


def test_size_and_names() -> None:
    model = build_small_resnet((64, 64, 3), None)
    assert 200_000 <= model.count_params() <= 700_000
    assert len(model.layers) < 100
    parts = {layer.name.split("_")[0] for layer in model.layers}
    assert parts == {"images", "stem", "stage1", "stage2", "stage3", "post"}


def test_initial_weights_keep_the_scale_of_the_signal() -> None:
    keras.utils.set_random_seed(0)
    images = np.random.default_rng(0).uniform(-1, 1, (4, 64, 64, 3)).astype(np.float32)
    features = build_small_resnet((64, 64, 3), None)(images, training=True).numpy()
    assert np.isfinite(features).all()
    assert 0.1 < features.std() < 10


def test_all_variables_have_gradients_and_training_lowers_the_loss() -> None:
    keras.utils.set_random_seed(0)
    model = build_small_resnet((32, 32, 3), None)
    labels = np.tile([0.0, 1.0], 8).astype(np.float32)
    noise = np.random.default_rng(0).normal(0, 0.1, (16, 32, 32, 3))
    images = tf.constant(noise + (labels * 0.5)[:, None, None, None], tf.float32)
    optimizer = keras.optimizers.SGD(0.05)
    losses = []
    for _ in range(5):
        with tf.GradientTape() as tape:
            logits = tf.reduce_mean(model(images, training=True), axis=[1, 2, 3]) - 0.4
            loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels, logits))
        gradients = tape.gradient(loss, model.trainable_variables)
        assert all(gradient is not None for gradient in gradients)
        optimizer.apply(gradients, model.trainable_variables)
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def test_there_are_no_imagenet_weights() -> None:
    with pytest.raises(UserError) as caught:
        build_backbone(find_backbone("SmallResNet"), 64, "imagenet")
    assert str(caught.value) == (
        "weights is 'imagenet'; SmallResNet has no ImageNet weights: give --weights=FILE, or "
        "--weights=none to train from scratch"
    )
