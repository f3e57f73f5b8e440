"""Builds what a config describes: task, network, parameter groups, photos."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from research.data.augmentation import (
    Augmentation,
    AugmentationPipeline,
    ColourJitter,
    HorizontalFlip,
    Mixing,
    RandAugment,
    RandomCrop,
)
from research.data.loader import DataLoader
from research.data.source import Source
from research.loop.plan import Plan
from research.loop.steps import Network
from research.models.backbone import Backbone, build_backbone, first_trainable_layer, stage_starts
from research.models.backbone_table import find_backbone
from research.models.split import split_backbone
from research.models.weights import load_weights
from research.models.wrapper import Wrapper, freeze_below, penalize
from research.optimization.averages import WeightAverages
from research.optimization.groups import Group, check_partition, make_group
from research.optimization.optimizers import OPTIMIZERS
from research.optimization.schedules import InTurn, LearningRate, Schedule, Shape
from research.settings.train_config import WEIGHTS_BY_NAME, TrainConfig
from research.system.errors import UserError
from research.system.python_file import is_python_reference, load_from_file
from research.tasks.checks import find_task
from research.tasks.losses import balanced_weights
from research.tasks.task import Task


@dataclasses.dataclass(frozen=True)
class BuiltNetwork:
    """A network ready to be trained.

    Attributes:
      network: the model and its two parts.
      backbone: the table's entry.
      first_trainable: index of the first backbone layer that is trained.
      origin: the source of the backbone's weights, in a few words.
    """

    network: Network
    backbone: Backbone
    first_trainable: int
    origin: str


def build_network(
    config: TrainConfig,
    class_names: tuple[str, ...],
    task: Task | None = None,
    with_weights: bool = True,
) -> BuiltNetwork:
    """Builds the model of a config, under the caller's strategy scope.

    Args:
      config: of the run.
      class_names: by label.
      task: makes the head; the built-in one if None.
      with_weights: False leaves the backbone as initialised; a checkpoint is restored later.

    Raises:
      UserError: the weights are missing or do not fit, or `unfreeze_from` names no layer.
    """
    # Again: reading data may have used the generators that initialise weights.
    keras.utils.set_random_seed(config.seed)
    backbone = find_backbone(config.backbone)
    named = with_weights and config.weights == "imagenet"
    base_model = build_backbone(backbone, config.image_size, "imagenet" if named else None)
    first = first_trainable_layer(base_model, backbone, config.unfreeze_from)
    total = len(base_model.variables)
    origin = f"loaded {total} of {total} variables, ImageNet" if named else "none loaded, random"
    if with_weights and config.weights not in WEIGHTS_BY_NAME:
        origin = str(load_weights(base_model, config.weights))
    model = Wrapper(base_model, seed=config.seed, task=task, class_names=class_names)
    freeze_below(base_model, first, config.bn_mode)
    penalize(model, config.l2_penalty)
    return BuiltNetwork(Network(model, split_backbone(base_model, first)), backbone, first, origin)


def make_groups(
    config: TrainConfig, model: Wrapper, step: tf.Variable, plan: Plan
) -> tuple[Group, ...]:
    """Puts each trainable variable in the group `head` or `backbone`.

    The backbone's schedule begins after the epochs that train the head alone. If stages have
    different learning rates or begin at different times, each stage is a group, the last one first.

    Raises:
      UserError: there are too few epochs for the last stage to begin.
    """
    parts = _parts_to_train(config, model)
    _check_beginnings(plan, len(parts))
    of_head = _of_head(config, plan, not parts)
    groups = [build_group(config, "head", model.head.trainable_variables, of_head, step)]
    for index, (name, variables) in enumerate(parts):
        schedule = Schedule(
            shape_of("backbone_schedule", config.backbone_schedule),
            config.backbone_learning_rate * config.stage_decay**index,
            min(plan.head_steps + index * plan.unfreezing_steps, plan.steps),
            plan.steps,
            plan.warmup_steps,
        )
        groups.append(build_group(config, name, variables, schedule, step))
    check_partition(groups, model.trainable_variables)
    return tuple(groups)


def build_group(
    config: TrainConfig,
    name: str,
    variables: Sequence[keras.Variable],
    schedule: LearningRate,
    step: tf.Variable,
) -> Group:
    """Builds a group with the optimizer that a config has for it; see `make_group`."""
    setting = "head_optimizer" if name == "head" else "backbone_optimizer"
    optimizer = getattr(config, setting)
    if is_python_reference(optimizer):
        build = load_from_file(setting, optimizer)
    else:
        build = OPTIMIZERS[optimizer]
        taken = set(inspect.signature(build).parameters) - {"learning_rate"}
        build = functools.partial(build, **{name: getattr(config, name) for name in taken})
    return make_group(name, variables, build, schedule, step, config.weight_decay)


def shape_of(setting: str, schedule: str) -> str | Shape:
    """Returns the shape of a schedule: a name of the table, or a function of the user's own."""
    if is_python_reference(schedule):
        return Shape(load_from_file(setting, schedule))
    return schedule


def _check_beginnings(plan: Plan, parts: int) -> None:
    """Raises `UserError` if a part of the backbone would never be trained."""
    epochs = plan.epochs - plan.head_epochs
    between = plan.unfreezing_steps // plan.steps_per_epoch
    needed = (parts - 1) * between + 1
    if between and 0 < epochs < needed:
        raise UserError(
            f"gradual_unfreezing is {between} and epochs is {epochs}, but there are {parts} "
            f"stages to unfreeze, and the last one would begin with epoch {needed}; give at least "
            f"--epochs={needed}, a smaller --gradual_unfreezing, or a later --unfreeze_from"
        )


def _of_head(config: TrainConfig, plan: Plan, is_alone: bool) -> LearningRate:
    """Returns the head's schedule: one while it is trained alone, and one after that."""
    peak, warmup = config.head_learning_rate, plan.warmup_steps
    shape = shape_of("head_schedule", config.head_schedule)
    if is_alone or plan.head_steps in (0, plan.steps):
        return Schedule(shape, peak, 0, plan.steps, warmup)
    tuned = config.tuned_head_learning_rate
    return InTurn(
        Schedule(shape, peak, 0, plan.head_steps, warmup),
        Schedule(shape, tuned, plan.head_steps, plan.steps, warmup),
    )


def _parts_to_train(config: TrainConfig, model: Wrapper) -> list[tuple[str, list[keras.Variable]]]:
    """Returns the name and the variables of each group of the backbone."""
    if config.stage_decay == 1 and not config.gradual_unfreezing:
        unfrozen = list(model.backbone.trainable_variables)
        return [("backbone", unfrozen)] if unfrozen else []
    layers = model.backbone.layers
    starts = stage_starts(model.backbone, find_backbone(config.backbone))
    ends = [*list(starts.values())[1:], len(layers)]
    parts = []
    for (name, start), end in zip(starts.items(), ends, strict=True):
        variables = [
            variable for layer in layers[start:end] for variable in layer.trainable_variables
        ]
        if variables:
            parts.append((f"backbone_{name}", variables))
    return parts[::-1]


def feature_epochs(loader: DataLoader, plan: Plan, groups: Sequence[Group]) -> int:
    """Returns the number of epochs at the beginning that can be trained from cached features.

    They train the head alone, and a photo has a countable number of views in them.
    """
    head_alone = len(groups) == 1 and loader.augmentation.views is not None
    return plan.epochs if head_alone else plan.head_epochs


def follow_weights(config: TrainConfig, model: Wrapper) -> WeightAverages | None:
    """Returns averages of all trained weights, built under the caller's strategy scope.

    The statistics of a trained BatchNorm are averages already, so they are not averaged again.

    Returns:
      None if the config does not ask for averages.
    """
    if not config.weight_averaging:
        return None
    return WeightAverages(model.trainable_variables, config.weight_averaging)


def make_loader(config: TrainConfig, source: Source) -> DataLoader:
    """Returns a run's photos, with the preprocessing of its backbone.

    Raises:
      UserError: an augmentation's file cannot be imported.
    """
    return DataLoader(
        config.image_size,
        config.batch_size,
        source=source,
        preprocessing=find_backbone(config.backbone).preprocessing,
        shuffle_size=config.shuffle_size,
        steps_per_epoch=config.steps_per_epoch,
        seed=config.seed,
        augmentation=make_augmentation(config),
        mirror_averaging=config.mirror_averaging,
    )


def make_augmentation(config: TrainConfig) -> AugmentationPipeline:
    """Returns the augmentations of training photos, in the order in which they are applied."""
    built_in = (
        (config.rand_augment, RandAugment(config.rand_augment)),
        (config.random_crop_area < 1, RandomCrop(config.random_crop_area)),
        (config.horizontal_flip, HorizontalFlip()),
        (config.colour_jitter, ColourJitter(config.colour_jitter)),
        (config.mixup or config.cutmix, Mixing(config.mixup, config.cutmix)),
    )
    own = [load_from_file("augmentation", file, Augmentation)() for file in config.augmentation]
    return AugmentationPipeline([one for used, one in built_in if used] + own)


def make_task(config: TrainConfig, kind: type[Task] | None = None) -> Task:
    """Returns a run's task. Its class weights follow from the photos, see `weigh_classes`.

    Args:
      config: of the run.
      kind: the class to build instead of the one that the config names.

    Raises:
      UserError: the task's file cannot be imported, or a setting asks for what the task's losses
        do not take into account.
    """
    kind = kind or find_task(config.task)
    check_supported(config, kind)
    return kind(label_smoothing=config.label_smoothing)


def check_supported(config: TrainConfig, kind: type[Task]) -> None:
    """Raises `UserError` if a setting asks for what a task's losses do not take into account."""
    asked = {
        "label_smoothing": config.label_smoothing,
        "class_weights": config.class_weights != "none",
        "mixup": config.mixup,
        "cutmix": config.cutmix,
    }
    for name, value in asked.items():
        if value and name not in kind.supports:
            raise UserError(
                f"{name} is {getattr(config, name)!r}, but the losses of {kind.__name__} do not "
                f"take it into account; leave out --{name}, or add it to {kind.__name__}.supports"
            )


def weigh_classes(task: Task, loader: DataLoader) -> None:
    """Gives a task class weights by which all classes of the training photos count the same.

    Raises:
      UserError: the labels are not classes.
    """
    labels = loader.examples("train").labels
    if labels.ndim != 1 or labels.dtype != np.int32:
        raise UserError(
            f"class_weights is 'balanced', but labels are {labels.dtype} of shape "
            f"{labels.shape[1:]}; expected the index of a class: give --class_weights=none"
        )
    task.class_weights = balanced_weights(
        np.bincount(labels, minlength=len(loader.class_names)).tolist()
    )
