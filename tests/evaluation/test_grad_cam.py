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
from research.models.wrapper import Wrapper
from tests.helpers import SMALL_CONFIG


def bright_spots(classes: int) -> Network:
    """Returns a network whose first feature channel shows red, and the second one green.

    Each channel is the evidence for its class. With two classes, red is evidence for the first.
    """
    image = keras.Input((32, 32, 3))
    features = keras.layers.AveragePooling2D(4)(image)
    features = keras.layers.Conv2D(2, 1, use_bias=False, name="last")(features)
    backbone = keras.Model(image, features)
    backbone.get_layer("last").set_weights([np.eye(3)[None, None, :, :2]])
    model = Wrapper(backbone, classes)
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
