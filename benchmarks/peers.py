"""The article's recipe with `keras.Model.fit`, and this project's step on the same photos."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from benchmarks.harness import ARTICLE
from flags.command_line import parse_config
from research.data.loader import DataLoader
from research.data.open_source import open_source
from research.data.order import share_out
from research.loop.builder import BuiltNetwork
from research.loop.learner import Learner
from research.loop.open_photos import photos_of_run
from research.loop.preparation import Run, set_up
from research.loop.steps import Network
from research.models.backbone_table import find_backbone
from research.models.cost import multiplications
from research.settings.train_config import TrainConfig
from research.system.team import Team
from research.train import train

IMAGE_SIZE = 160
BATCH_SIZE = 32  # if a benchmark does not name another


def fit_model(backbone: str, unfreeze_from: int | None, weights: str | None = None) -> keras.Model:
    """Returns the article's model, compiled: RMSprop at 1e-4, loss from logits.

    Args:
      backbone: a name of `keras.applications`.
      unfreeze_from: index of the first trainable layer; None freezes the whole backbone.
      weights: a Keras weights file; None for random weights.
    """
    base = find_backbone(backbone).build((IMAGE_SIZE, IMAGE_SIZE, 3), None)
    if weights:
        base.load_weights(weights)
    base.trainable = True
    for layer in base.layers[:unfreeze_from]:
        layer.trainable = False
    pooled = keras.layers.GlobalAveragePooling2D()(base.output)
    model = keras.Model(base.input, keras.layers.Dense(1)(pooled))
    model.compile(
        keras.optimizers.RMSprop(1e-4),
        keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=[keras.metrics.BinaryAccuracy(threshold=0.0)],
    )
    return model


def scale_and_resize(image: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns a photo or a batch as the article prepares it, float32 in [-1, 1], and its label."""
    scaled = tf.cast(image, tf.float32) / 127.5 - 1
    return tf.image.resize(scaled, (IMAGE_SIZE, IMAGE_SIZE)), label


def fit_batches(photos: DataLoader, split: str, batch_size: int = BATCH_SIZE) -> tf.data.Dataset:
    """Returns a split's decoded photos as input of `fit`: in memory, batched, prefetched."""
    examples = photos.examples(split)
    (pixels,) = examples.inputs
    batches = tf.data.Dataset.from_tensor_slices((pixels, examples.labels)).batch(batch_size)
    batches = batches.map(scale_and_resize, num_parallel_calls=tf.data.AUTOTUNE)
    return batches.prefetch(tf.data.AUTOTUNE)


def decoded_photos(arguments: argparse.Namespace) -> DataLoader:
    """Returns the photos that a benchmark's flags select, decoded."""
    source = open_source(arguments.dataset, None, arguments.data_dir)
    photos = DataLoader(IMAGE_SIZE, BATCH_SIZE, source=source)
    for split in ("train", "validation"):
        photos.examples(split)
    return photos


def article(arguments: argparse.Namespace, **settings: Any) -> TrainConfig:
    """Returns the article's settings with BatchNorm frozen, random weights and other changes."""
    data = {"dataset": arguments.dataset, "data_dir": arguments.data_dir}
    return dataclasses.replace(parse_config(TrainConfig, list(ARTICLE)), **data, **settings)


def train_article(arguments: argparse.Namespace, **settings: Any) -> list[dict[str, Any]]:
    """Trains with the settings of `article`; returns the rows of metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        directory = train(article(arguments, ckpt_dir=f"{folder}/run", **settings))
        assert directory is not None
        return directory.read_metrics()


def set_up_article(arguments: argparse.Namespace, **settings: Any) -> Run:
    """Sets up a run with the settings of `article`, without training it."""
    config = article(arguments, **settings)
    return set_up(config, Team(tf.distribute.get_strategy()), photos_of_run(config))


def training_step(run: Run, network: Network, loader: DataLoader) -> Callable[..., float]:
    """Returns a function that makes the next training steps of a run.

    Its argument is the number of steps, 1 if it is left out. It returns the seconds spent waiting
    for input, after a GPU has done all steps.

    Args:
      run: from `set_up_article`.
      network: computes the logits from the loader's photos or cached outputs.
      loader: its batches of the first epoch are repeated.
    """
    learner = Learner(
        *(run.team.strategy, run.task, network, run.groups, run.state, run.options),
        finish=loader.finish,
    )
    batches = iter(
        share_out(lambda share: loader.epoch_batches(0, share=share).repeat(), learner.strategy)
    )

    def make_steps(count: int = 1) -> float:
        done = learner.train_steps(batches, count)
        _ = run.state.current_step  # waits for the device
        return done.waiting_seconds

    return make_steps


def operations_per_photo(built: BuiltNetwork) -> tuple[float, float]:
    """Returns the multiplications and additions of a training step for one photo.

    Returns:
      Those of the trunk, one forward pass; and those of the layers from the first trainable one on,
      one forward pass and two backward passes.
    """
    layers, first = built.network.model.backbone.layers, built.first_trainable
    trunk, rest = (sum(map(multiplications, part)) for part in (layers[:first], layers[first:]))
    return 2.0 * trunk, 6.0 * rest
