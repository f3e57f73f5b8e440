"""Builds what a config describes: the network, its parameter groups, its photos and its loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from research.averages import WeightAverages
from research.backbones import find_backbone
from research.config import WEIGHTS_BY_NAME, TrainConfig
from research.errors import UserError
from research.loader import DataLoader
from research.losses import Loss, balanced_weights
from research.model import Wrapper, freeze_below, penalize, trained_backbone
from research.networks.backbone import Backbone, build_backbone, first_trainable_layer, stage_starts
from research.networks.weights import load_weights
from research.optimizers import Group, check_partition, make_group
from research.photos.augmentation import Augmentation
from research.photos.source import Source
from research.plan import Plan
from research.schedules import InTurn, Rising, Schedule
from research.split import split_backbone
from research.steps import Network


@dataclasses.dataclass(frozen=True)
class BuiltNetwork:
    """A network ready to be trained.

    Attributes:
      network: the model and its two parts.
      backbone: the table's entry.
      first_trainable: index of the first backbone layer that is trained.
      origin: where the backbone's weights came from, in a few words.
    """

    network: Network
    backbone: Backbone
    first_trainable: int
    origin: str


def build_network(config: TrainConfig, num_classes: int, with_weights: bool = True) -> BuiltNetwork:
    """Builds the model of a config, under the caller's strategy scope.

    Args:
      config: of the run.
      num_classes: the number of classes.
      with_weights: False leaves the backbone as initialised, for a checkpoint to fill.

    Raises:
      UserError: the weights cannot be had or do not fit, or `unfreeze_from` names no layer.
    """
    # Again, as reading data may have drawn from the generators that initial weights come from.
    keras.utils.set_random_seed(config.seed)
    backbone = find_backbone(config.backbone)
    named = with_weights and config.weights == "imagenet"
    base_model = build_backbone(backbone, config.image_size, "imagenet" if named else None)
    first = first_trainable_layer(base_model, backbone, config.unfreeze_from)
    total = len(base_model.variables)
    origin = f"loaded {total} of {total} variables, ImageNet" if named else "none loaded, random"
    if with_weights and config.weights not in WEIGHTS_BY_NAME:
        origin = str(load_weights(base_model, config.weights))
    model = Wrapper(base_model, num_classes, config.seed)
    freeze_below(base_model, first, config.bn_mode)
    penalize(model, config.l2_penalty)
    return BuiltNetwork(Network(model, split_backbone(base_model, first)), backbone, first, origin)


def make_groups(
    config: TrainConfig, model: Wrapper, step: tf.Variable, plan: Plan
) -> tuple[Group, ...]:
    """Puts each trainable variable in the group `head` or `backbone`; frozen ones in neither.

    The backbone's schedule begins after the epochs that train the head alone. With a learning rate
    or a beginning for each stage, the backbone's group is one for each of them, from the last.

    Raises:
      UserError: there are too few epochs for the last stage to begin.
    """
    parts = _parts_to_train(config, model)
    _check_beginnings(plan, len(parts))
    of_head = _of_head(config, plan, not parts)
    groups = [build_group(config, "head", model.head.trainable_variables, of_head, step)]
    for index, (name, variables) in enumerate(parts):
        schedule = Schedule(
            config.backbone_schedule,
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
    schedule: Schedule | InTurn | Rising,
    step: tf.Variable,
) -> Group:
    """Builds a group with the optimizer that a config has for it; see `make_group`."""
    optimizer = config.head_optimizer if name == "head" else config.backbone_optimizer
    return make_group(
        name, variables, optimizer, schedule, step, config.weight_decay, config.momentum
    )


def _check_beginnings(plan: Plan, parts: int) -> None:
    """Raises `UserError` where a part of the backbone would never begin to train."""
    epochs = plan.epochs - plan.head_epochs
    between = plan.unfreezing_steps // plan.steps_per_epoch
    needed = (parts - 1) * between + 1
    if between and 0 < epochs < needed:
        raise UserError(
            f"gradual_unfreezing is {between} and epochs is {epochs}, but there are {parts} "
            f"stages to unfreeze, of which the last would begin with epoch {needed}; give at least "
            f"--epochs={needed}, a smaller --gradual_unfreezing, or a later --unfreeze_from"
        )


def _of_head(config: TrainConfig, plan: Plan, is_alone: bool) -> Schedule | InTurn:
    """Returns the head's schedule: one for the epochs in which it is alone, one for the others."""
    peak, shape, warmup = config.head_learning_rate, config.head_schedule, plan.warmup_steps
    if is_alone or plan.head_steps in (0, plan.steps):
        return Schedule(shape, peak, 0, plan.steps, warmup)
    tuned = config.tuned_head_learning_rate
    return InTurn(
        Schedule(shape, peak, 0, plan.head_steps, warmup),
        Schedule(shape, tuned, plan.head_steps, plan.steps, warmup),
    )


def _parts_to_train(config: TrainConfig, model: Wrapper) -> list[tuple[str, list[keras.Variable]]]:
    """Returns the variables of each group of the backbone, with its name."""
    if config.stage_decay == 1 and not config.gradual_unfreezing:
        unfrozen = trained_backbone(model)
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


def feature_epochs(config: TrainConfig, plan: Plan, groups: Sequence[Group]) -> int:
    """Returns how many epochs at the beginning need no more than a photo's pooled features.

    They train the head alone, and show photos in a few views.
    """
    head_alone = len(groups) == 1 and not config.draws_without_end
    return plan.epochs if head_alone else plan.head_epochs


def follow_weights(config: TrainConfig, model: Wrapper) -> WeightAverages | None:
    """Returns averages of all that is trained, under the caller's strategy scope, if asked for.

    The statistics of a BatchNorm that is trained are averages already; they stay as they are.
    """
    if not config.weight_averaging:
        return None
    return WeightAverages(model.trainable_variables, config.weight_averaging)


def make_loader(config: TrainConfig, source: Source, built: BuiltNetwork) -> DataLoader:
    """Returns a run's photos, as its backbone takes them."""
    return DataLoader(
        config.image_size,
        config.batch_size,
        source=source,
        preprocessing=built.backbone.preprocessing,
        shuffle_size=config.shuffle_size,
        steps_per_epoch=config.steps_per_epoch,
        seed=config.seed,
        augmentation=augmentation_of(config),
        mirror_averaging=config.mirror_averaging,
    )


def augmentation_of(config: TrainConfig) -> Augmentation:
    """Returns how training photos are changed."""
    return Augmentation(
        rand_augment=config.rand_augment,
        random_crop_area=config.random_crop_area,
        horizontal_flip=config.horizontal_flip,
        colour_jitter=config.colour_jitter,
        mixup=config.mixup,
        cutmix=config.cutmix,
    )


def make_loss(config: TrainConfig, photos: DataLoader) -> Loss:
    """Returns what a run minimises."""
    if config.class_weights == "none":
        return Loss(config.label_smoothing)
    labels = photos.examples("train").labels
    counts = np.bincount(labels, minlength=len(photos.class_names))
    return Loss(config.label_smoothing, balanced_weights(tuple(int(count) for count in counts)))
