"""Small learners on random photos, on one logical device or several, for the tests of steps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import keras
import numpy as np
import tensorflow as tf

from research.data.batches import make_batches
from research.data.order import share_out
from research.data.split_arrays import SplitArrays
from research.loop.builder import build_network, make_groups
from research.loop.learner import Learner, StepOptions
from research.loop.plan import make_plan
from research.loop.run_state import RunState
from research.settings.train_config import TrainConfig
from research.tasks.checks import sum_shapes
from research.tasks.metrics import Metrics
from research.tasks.task import Task
from tests.helpers import SMALL_CONFIG, randomize_head

CONFIG = dataclasses.replace(
    SMALL_CONFIG,
    unfreeze_from="stage3",
    epochs=2,
    head_epochs=0,
    warmup="0steps",
    head_schedule="constant",
    backbone_schedule="constant",
    horizontal_flip=False,
    momentum=0.0,
    head_optimizer="sgd",
    head_learning_rate=0.5,
    backbone_optimizer="sgd",
    backbone_learning_rate=0.01,
    trunk_cache="off",
)

ODD = dataclasses.replace(
    CONFIG,
    clip_norm=0.5,  # below the first steps' norms: it does something
    weight_decay=0.1,
    l2_penalty=0.01,
)


TASK = Task()
CLASSES = ("cat", "dog")
SHAPES: dict[str, tuple[int, ...]] = {
    "loss": (),
    "accuracy": (),
    "cross_entropy": (),
    "weight": (),
}


LABELS = {"label": tf.TensorSpec((None,), tf.int32)}


def some_photos(count: int, classes: int = 2) -> SplitArrays:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    labels = generator.integers(classes, size=count).astype(np.int32)
    return SplitArrays((pixels,), labels, tuple(map(str, range(count))))


def scale(image: tf.Tensor) -> tf.Tensor:
    return image / 127.5 - 1


def feed(learner: Learner, examples: SplitArrays, size: int, preprocessing=scale):
    """The examples in their order, in batches of `size`, shared out to the learner's devices."""
    order = np.arange(len(examples))
    return share_out(
        lambda share: make_batches(
            examples, order, min(size, len(order)), preprocessing, share=share
        ),
        learner.strategy,
        learner.options.accumulate_steps,
    )


@functools.cache
def mirrored(replicas: int) -> tf.distribute.Strategy:
    """A process bears one strategy that reduces by collectives; four devices do without."""
    devices = [f"CPU:{index}" for index in range(replicas)]
    reduction = tf.distribute.ReductionToOneDevice() if replicas > 2 else None
    return tf.distribute.MirroredStrategy(devices, reduction)


def make_learner(
    config: TrainConfig,
    replicas: int = 1,
    photos: int = 20,
    xla: bool = False,
    task: Task | None = None,
    classes: tuple[str, ...] = CLASSES,
    batch: Mapping[str, tf.TensorSpec] = LABELS,
) -> Learner:
    """A learner whose initial weights depend on nothing but the config's seed."""
    keras.utils.set_random_seed(config.seed)
    strategy = mirrored(replicas) if replicas > 1 else tf.distribute.get_strategy()
    with strategy.scope():
        network = build_network(config, classes, task).network
        randomize_head(network.model, config.seed)
        state = RunState(sum_shapes(task or TASK, network.model.logits, batch))
        groups = make_groups(config, network.model, state.step, make_plan(config, photos))
    options = StepOptions(config.accumulate_steps, config.clip_norm, xla, exchange=config.exchange)
    return Learner(strategy, task or TASK, network, groups, state, options)


def metrics_of(learner: Learner) -> Metrics:
    """Of the steps since the tally was reset."""
    return learner.metrics(learner.state.tally.read())


def model_of(learner: Learner):
    return learner.network.model


def weights(learner: Learner) -> list[np.ndarray]:
    return [variable.numpy() for variable in model_of(learner).variables]


def train(learner: Learner, examples: SplitArrays, size: int) -> list[float]:
    """Trains one pass and returns the mean loss after each step."""
    losses = []
    for batch in feed(learner, examples, size):
        learner.train_step(batch)
        losses.append(metrics_of(learner).loss)
    return losses
