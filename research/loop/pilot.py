"""The pilot: what the frozen features of some photos tell, before the first step of a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from research.data.loader import DataLoader
from research.models.split import split_backbone
from research.models.wrapper import Wrapper
from research.settings.automatic import FEWEST_PHOTOS, Evidence
from research.system.errors import UserError
from research.tasks.labels import check_class_indices

MOST_PHOTOS = 256
BATCH_SIZE = 32
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def run_pilot(model: Wrapper, loader: DataLoader, seed: int) -> Evidence | str:
    """Returns what some training photos tell, or why they tell nothing.

    Args:
      model: with the initial weights.
      loader: the photos.
      seed: of the sample of photos.
    """
    examples, classes = loader.examples("train"), len(loader.class_names)
    try:
        check_class_indices(examples.labels, classes)
    except UserError:
        return "the labels are not one class per photo"
    if len(examples) < FEWEST_PHOTOS:
        return f"{len(examples):,} photos are too few to tell"
    sample = np.sort(np.random.default_rng(seed).permutation(len(examples))[:MOST_PHOTOS])
    photos, labels = examples.inputs[0].take(sample, axis=0), examples.labels[sample]
    model.backbone.trainable = False  # so that its BatchNorm layers are folded
    backbone = split_backbone(model.backbone, len(model.backbone.layers))
    model.backbone.trainable = True

    @tf.function(input_signature=[tf.TensorSpec((None, *photos.shape[1:]))], autograph=False)
    def features(images: tf.Tensor) -> tf.Tensor:
        images = loader.preprocessing(images) if loader.preprocessing else images
        pooled = model.pooling(*backbone.activations(images))
        return tf.reshape(tf.cast(pooled, tf.float32), (tf.shape(images)[0], -1))

    seen: list[list[np.ndarray]] = []
    for first in range(0, len(photos), BATCH_SIZE):
        images = tf.cast(photos[first : first + BATCH_SIZE], tf.float32)
        seen.append([features(view).numpy() for view in (images, tf.reverse(images, [2]))])
    views = [np.concatenate(batches) for batches in zip(*seen, strict=True)]
    right, mirrored = left_out_predictions(views, labels, classes)
    lost, won = int((right & ~mirrored).sum()), int((mirrored & ~right).sum())
    return Evidence(len(photos), float(right.mean()), lost, won)


def left_out_predictions(
    views: Sequence[np.ndarray], labels: np.ndarray, classes: int
) -> list[np.ndarray]:
    """Predicts each photo by ridge regression on the first view of all other photos.

    The solution without a photo follows from that with all photos (leave-one-out, Rasmussen and
    Williams 2006, Gaussian Processes for Machine Learning, equation 5.12). The penalty is that with
    the smallest squared error.

    Args:
      views: features of the photos in each view, float (photos, channels).
      labels: int (photos,).
      classes: number of classes.

    Returns:
      For each view, bool (photos,): whether the predicted class is right.
    """
    features = np.asarray(views[0], np.float64)
    scale = np.square(features).sum(axis=1).mean()
    targets = np.eye(classes)[labels]
    kernel = features @ features.T / scale
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    for penalty in PENALTIES:
        inverse = np.linalg.inv(kernel + penalty * np.eye(len(kernel)))
        weights = inverse @ targets
        error = np.square(weights / np.diag(inverse)[:, np.newaxis]).sum()
        if best is None or error < best[0]:
            best = error, inverse, weights
    assert best is not None
    _, inverse, weights = best
    right = []
    for view in views:
        similarity = np.asarray(view, np.float64) @ features.T / scale
        own = (similarity * inverse).sum(axis=1) / np.diag(inverse)
        predicted = similarity @ weights - own[:, np.newaxis] * weights
        right.append(predicted.argmax(axis=1) == labels)
    return right
