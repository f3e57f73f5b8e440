"""Your own backbone: a small VGG network (Simonyan and Zisserman 2014, arXiv 1409.1556).

Flags: --backbone=examples/small_vgg.py:SmallVGG --weights=none
"""

from __future__ import annotations

import keras
import tensorflow as tf
from keras import layers

from research.models.backbone import Backbone, Stage

FILTERS = (16, 32, 64, 96)


def build(input_shape: tuple[int, int, int], weights: None) -> keras.Model:
    """Each block halves height and width. The stages below find a layer by its name."""
    images = features = keras.Input(input_shape)
    for block, filters in enumerate(FILTERS, start=1):
        for name in (f"block{block}_conv1", f"block{block}_conv2"):
            features = layers.Conv2D(filters, 3, padding="same", name=name)(features)
            features = layers.BatchNormalization(name=f"{name}_bn")(features)
            features = layers.ReLU(name=f"{name}_relu")(features)
        features = layers.MaxPooling2D(name=f"block{block}_pool")(features)
    return keras.Model(images, features)


def preprocessing(images: tf.Tensor) -> tf.Tensor:
    return images / 127.5 - 1.0


LATER = (Stage("block2", "block2_"), Stage("block3", "block3_"), Stage("block4", "block4_"))
SmallVGG = Backbone("SmallVGG", build, preprocessing, stages=(Stage("block1"), *LATER))
