"""Grad-CAM finds evidence at known places, also in a backbone split at the frozen layers."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

from research.evaluation.grad_cam import grad_cam
from research.loop.builder import build_network
from research.loop.steps import Network
from research.models.split import split_backbone
from research.models.vision_transformer import build_vision_transformer
from research.models.wrapper import Wrapper
from tests.helpers import SMALL_CONFIG, randomize_head


def bright_spots(classes: int) -> Network:
    """Returns a network whose first feature channel shows red, and the second one green.

    Each channel is the evidence for its class. With two classes, red is evidence for the first.
    """
    image = keras.Input((32, 32, 3))
    features = keras.layers.AveragePooling2D(4)(image)
    features = keras.layers.Conv2D(2, 1, use_bias=False, name="last")(features)
    backbone = keras.Model(image, features)
    backbone.get_layer("last").set_weights([np.eye(3)[None, None, :, :2]])
    model = randomize_head(Wrapper(backbone, classes))
    weights = np.array([[-1.0], [1.0]]) if classes == 2 else np.array([[1.0, 0, 0], [0, 1.0, 0]])
    model.head.set_weights([weights, np.zeros(weights.shape[1])])
    return Network(model, split_backbone(backbone, 0))


@pytest.mark.parametrize("classes", [2, 3])
def test_evidence_is_found_at_its_place(classes):
    image = np.zeros((1, 32, 32, 3), np.float32)
    image[0, 8:12, 20:24, 0] = 1  # red: place (2, 5) of the map of 8 x 8
    image[0, 24:28, 4:8, 1] = 0.5  # green: place (6, 1)
    images = tf.constant(np.repeat(image, 2, axis=0))
    red, green = grad_cam(bright_spots(classes), images, tf.constant([0, 1])).numpy()
    assert np.argwhere(red == 1).tolist() == [[2, 5]]
    assert np.argwhere(green == 1).tolist() == [[6, 1]]
    assert red.sum() == green.sum() == 1  # the maximum of each map is 1; all else is 0


def test_the_map_is_0_without_evidence():
    images = tf.zeros((1, 32, 32, 3))
    assert not grad_cam(bright_spots(2), images, tf.constant([1])).numpy().any()


def bright_patches(frozen: int) -> Network:
    """Returns a vision transformer whose class token gets the mean colour of the patches.

    Red is in channel 0 and green in channel 2. Channels 1 and 3 are their negatives, because the
    mean of a token is subtracted from it. The first `frozen` layers are in the trunk.
    """
    backbone = build_vision_transformer((32, 32, 3), None, "bright", 64, 1, 8, 32)
    for variable in backbone.weights:
        if variable.name != "gamma":
            variable.assign(tf.zeros_like(variable))
    patches = backbone.get_layer("embedding").get_layer("patches")
    kernel = np.zeros((8, 8, 3, 64), np.float32)
    kernel[:, :, 0, :2] = kernel[:, :, 1, 2:4] = [1, -1]
    patches.kernel.assign(kernel)
    value = np.concatenate([np.zeros((64, 128)), np.eye(64)], axis=1)  # equal shares of attention
    backbone.get_layer("block0_qkv").kernel.assign(value)
    backbone.get_layer("block0_proj").kernel.assign(np.eye(64))
    model = randomize_head(Wrapper(backbone, 3))
    model.head.set_weights([np.eye(64)[:, [0, 2, 4]], np.zeros(3)])
    return Network(model, split_backbone(backbone, frozen))


@pytest.mark.parametrize("frozen", [0, 5, 11])
def test_evidence_in_a_vision_transformer_is_found_at_its_patch(frozen):
    image = np.zeros((1, 32, 32, 3), np.float32)
    image[0, 8:16, 24:32, 0] = 1  # red: place (1, 3) of the map of 4 x 4
    image[0, 16:24, :8, 1] = 1  # green: place (2, 0)
    images = tf.constant(np.repeat(image, 3, axis=0))
    red, green, other = grad_cam(bright_patches(frozen), images, tf.constant([0, 1, 2])).numpy()
    assert np.argwhere(red).tolist() == [[1, 3]]
    assert np.argwhere(green).tolist() == [[2, 0]]
    assert red.max() == green.max() == 1
    assert not other.any()


@pytest.mark.parametrize(
    ("backbone", "unfreeze_from"),
    [
        ("MobileNetV2", "stage5"),
        ("VGG16", "none"),
        ("ConvNeXtTiny", "stage3"),
    ],
)
def test_a_split_backbone_gives_the_map_of_the_whole_backbone(backbone, unfreeze_from):
    config = dataclasses.replace(
        SMALL_CONFIG, backbone=backbone, unfreeze_from=unfreeze_from, image_size=64
    )
    built = build_network(config, ("a", "b", "c"))
    randomize_head(built.network.model)
    pixels = np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 3)).astype(np.float32)
    images = tf.convert_to_tensor(built.backbone.preprocessing(tf.constant(pixels)))
    found = grad_cam(built.network, images, tf.constant([0, 2])).numpy()
    model = built.network.model
    features = model.backbone(images, training=False).numpy()
    # The gradient of a mean over places and a dense layer is the kernel of the layer.
    kernel = model.head.get_weights()[0][:, [0, 2]]
    wanted = np.maximum(np.einsum("bhwc,cb->bhw", features, kernel), 0)
    wanted /= np.maximum(wanted.max(axis=(1, 2), keepdims=True), 1e-30)
    assert found.shape == features.shape[:3]
    assert found == pytest.approx(wanted, abs=2e-3)
