"""Builds what a config describes: the network and its parameter groups."""

from __future__ import annotations

import dataclasses

import keras
import tensorflow as tf

from research.backbone import Backbone, build_backbone, first_trainable_layer
from research.backbones import find_backbone
from research.config import WEIGHTS_BY_NAME, TrainConfig
from research.model import Wrapper, freeze_below, penalize, trained_backbone
from research.optimizers import Group, check_partition, make_group
from research.plan import Plan
from research.schedules import Schedule
from research.split import split_backbone
from research.steps import Network
from research.weights import load_weights


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

    The backbone's schedule begins after the epochs that train the head alone.
    """
    head = Schedule(
        config.head_schedule, config.head_learning_rate, 0, plan.steps, config.warmup_steps
    )
    groups = [
        make_group(
            "head",
            model.head.trainable_variables,
            config.head_optimizer,
            head,
            step,
            config.weight_decay,
        )
    ]
    unfrozen = trained_backbone(model)
    if unfrozen:
        schedule = Schedule(
            config.backbone_schedule,
            config.backbone_learning_rate,
            plan.head_steps,
            plan.steps,
            config.warmup_steps,
        )
        groups.append(
            make_group(
                "backbone", unfrozen, config.backbone_optimizer, schedule, step, config.weight_decay
            )
        )
    check_partition(groups, model.trainable_variables)
    return tuple(groups)
