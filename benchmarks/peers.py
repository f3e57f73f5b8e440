"""The peer: the article's recipe through keras.Model.fit; and ours built on the same photos."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import keras
import tensorflow as tf

from flags.command_line import parse_config
from research.data.batches import Batch
from research.data.loader import DataLoader
from research.data.open_source import open_source
from research.models.backbone_table import find_backbone
from research.settings.train_config import TrainConfig
from research.system.devices import resolve_xla
from research.tasks.checks import sum_shapes
from research.tasks.task import Task
from research.training.builder import BuiltNetwork, build_network, make_groups
from research.training.learner import Learner, StepOptions
from research.training.plan import Plan, make_plan
from research.training.run_state import RunState

IMAGE_SIZE, BATCH_SIZE = 160, 32


def article(bn_mode: str = "frozen") -> TrainConfig:
    """Returns the article's settings, whatever the defaults are, with random weights."""
    path = Path(__file__).parents[1] / "recipes" / "article.flags"
    flags = [f"--flagfile={path}", f"--bn_mode={bn_mode}", "--weights=none"]
    return parse_config(TrainConfig, flags)


def fit_model(backbone: str, unfreeze_from: int | None, weights: str | None = None) -> keras.Model:
    """Returns the article's model, compiled: RMSprop at 1e-4, loss from logits.

    Args:
      backbone: a name of `keras.applications`.
      unfreeze_from: index of the first trainable layer; None freezes the whole backbone.
      weights: a Keras weights file; None for random ones.
    """
    entry = find_backbone(backbone)
    base = entry.build((IMAGE_SIZE, IMAGE_SIZE, 3), None)
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


def fit_batches(photos: DataLoader, split: str) -> tf.data.Dataset:
    """Returns a split's decoded photos as `fit` wants them: in memory, batched, prefetched."""
    examples = photos.examples(split)
    (pixels,) = examples.inputs

    def prepare(image: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.cast(image, tf.float32) / 127.5 - 1, label

    batches = tf.data.Dataset.from_tensor_slices((pixels, examples.labels)).batch(BATCH_SIZE)
    return batches.map(prepare, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def photos_of(arguments: argparse.Namespace) -> DataLoader:
    """Returns the photos that a benchmark was told to use, decoded."""
    source = open_source(arguments.dataset, None, arguments.data_dir)
    photos = DataLoader(IMAGE_SIZE, BATCH_SIZE, source=source)
    for split in ("train", "validation"):
        photos.examples(split)
    return photos


@dataclasses.dataclass
class Ours:
    """A run of ours, taken to pieces: what its steps need."""

    config: TrainConfig
    built: BuiltNetwork
    plan: Plan
    state: RunState
    photos: DataLoader

    def learner(self) -> Learner:
        """Returns a learner of the network without any cache."""
        groups = make_groups(self.config, self.built.network.model, self.state.step, self.plan)
        options = StepOptions(xla=resolve_xla(self.config.xla, None))
        strategy = tf.distribute.get_strategy()
        return Learner(strategy, Task(), self.built.network, groups, self.state, options)


def our_run(config: TrainConfig, photos: DataLoader) -> Ours:
    """Builds what a config describes, on photos at hand."""
    plan = make_plan(config, photos.num_train_examples)
    built = build_network(config, photos.class_names)
    batch = photos.train_batches.element_spec
    state = RunState(sum_shapes(Task(), built.network.model.logits, batch))
    return Ours(config, built, plan, state, photos)


def endless(photos: DataLoader) -> Iterator[Batch]:
    """Yields a loader's training batches, epoch after epoch."""
    epoch = 0
    while True:
        yield from photos.epoch_batches(epoch)
        epoch += 1
