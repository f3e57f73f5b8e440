"""Builds the parts of a run from its settings: task, network, parameter groups, photos."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Literal

import keras
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
from research.data.photo_cache import PhotoCache
from research.data.source import Source
from research.data.split_arrays import SplitArrays
from research.loop.plan import Plan
from research.loop.steps import Network
from research.models import hub
from research.models.backbone import (
    Backbone,
    build_backbone,
    check_preprocessing,
    first_trainable_layer,
    stage_starts,
)
from research.models.backbone_table import find_backbone
from research.models.split import split_backbone
from research.models.weights import load_weights
from research.models.wrapper import Wrapper, freeze_below, has_depthwise, penalize
from research.optimization.averages import WeightAverages
from research.optimization.groups import Group, check_partition, make_group
from research.optimization.optimizers import OPTIMIZERS
from research.optimization.schedules import LearningRate, Schedule, SequentialSchedule, Shape
from research.settings.fields import AUTO
from research.settings.train_config import WEIGHTS_BY_NAME, TrainConfig
from research.system import devices
from research.system.errors import UserError
from research.system.python_file import (
    construct_from_file,
    failures_in_one_line,
    is_python_reference,
    load_from_file,
)
from research.tasks.checks import find_task
from research.tasks.task import Task

RANDOM = "none loaded, random"


@dataclasses.dataclass(frozen=True)
class BuiltNetwork:
    """A network ready to be trained.

    Attributes:
      network: the model and its two parts.
      backbone: the backbone's entry in the table of backbones, or in the user's file.
      first_trainable: index of the first trained layer of the backbone.
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
    """Builds the network of a config; see `build_model` and `divide_model`."""
    model, origin = build_model(config, class_names, task, with_weights)
    return divide_model(config, model, origin)


def build_model(
    config: TrainConfig,
    class_names: tuple[str, ...],
    task: Task | None = None,
    with_weights: bool = True,
) -> tuple[Wrapper, str]:
    """Builds the model of a config, in the caller's strategy scope.

    Args:
      config: the run's settings.
      class_names: by label.
      task: makes the head. None takes the built-in task.
      with_weights: whether to load the weights of the config. False keeps the initial weights,
        because a checkpoint is restored later.

    Returns:
      The model, and the source of the backbone's weights in a few words.

    Raises:
      UserError: the weights are missing or do not fit the backbone, or `unfreeze_from` names no
        layer of it.
    """
    backbone = find_backbone(config.backbone)
    config.check_sizes(backbone)
    is_imagenet = with_weights and config.weights == "imagenet"
    weights: Literal["imagenet"] | None = "imagenet" if is_imagenet else None
    base_model = _build_base_model(config, backbone, weights)
    if config.precision == "auto" and _is_slow_in_bfloat16(base_model, config.bn_mode):
        devices.set_precision("float32")
        base_model = _build_base_model(config, backbone, weights)
    with failures_in_one_line("backbone", config.backbone, "preprocessing failed"):
        check_preprocessing(backbone, config.image_size)
    if config.unfreeze_from != AUTO:
        first_trainable_layer(base_model, backbone, config.unfreeze_from)
    total = len(base_model.variables)
    origin = RANDOM if with_weights else "those of the checkpoint"
    if is_imagenet:
        origin = f"loaded {total} of {total} variables, ImageNet"
    if with_weights and config.weights not in WEIGHTS_BY_NAME:
        origin = _load(base_model, config.weights)
    model = Wrapper(base_model, seed=config.seed, task=task, class_names=class_names)
    return model, origin


def _build_base_model(
    config: TrainConfig, backbone: Backbone, weights: Literal["imagenet"] | None
) -> keras.Model:
    # Seeded again, because reading data may have used the generators that initialise weights.
    keras.utils.set_random_seed(config.seed)
    with failures_in_one_line("backbone", config.backbone, "build failed"):
        return build_backbone(backbone, config.image_size, weights)


def _is_slow_in_bfloat16(model: keras.Model, bn_mode: str) -> bool:
    """Returns whether a model that was built for bfloat16 computes faster in float32.

    On CPUs, the gradients of depthwise convolutions are slow in bfloat16. With a frozen BatchNorm,
    they are computed in float32, see `FoldedConvolution`.
    """
    in_bfloat16 = keras.config.dtype_policy().compute_dtype == "bfloat16"
    return not devices.has_gpu() and in_bfloat16 and bn_mode != "frozen" and has_depthwise(model)


def divide_model(config: TrainConfig, model: Wrapper, origin: str) -> BuiltNetwork:
    """Freezes the first layers of a model, and splits it there, in the caller's strategy scope.

    Args:
      config: the run's settings, with a value for `unfreeze_from`.
      model: as `build_model` returned it.
      origin: the source of the backbone's weights in a few words.
    """
    backbone, base_model = find_backbone(config.backbone), model.backbone
    first = first_trainable_layer(base_model, backbone, config.unfreeze_from)
    freeze_below(base_model, first, config.bn_mode)
    penalize(model, config.l2_penalty)
    parts = split_backbone(base_model, first, config.recompute == "blocks")
    return BuiltNetwork(Network(model, parts), backbone, first, origin)


def _load(model: keras.Model, weights: str) -> str:
    """Loads weights from a file or the hub; returns their source in a few words."""
    if not weights.startswith(hub.SCHEME):
        return str(load_weights(model, weights))
    file = hub.download_weights(weights)
    return f"{load_weights(model, file.path)}, {weights}, commit {file.commit[:8]}"


def make_groups(
    config: TrainConfig, model: Wrapper, step: tf.Variable, plan: Plan
) -> tuple[Group, ...]:
    """Puts each trainable variable in the group `head` or `backbone`.

    The backbone's schedule begins after the epochs that train the head alone. If stages have
    different learning rates or begin at different times, each stage is a group; the last stage
    comes first.

    Raises:
      UserError: there are too few epochs to unfreeze all stages.
    """
    parts = _backbone_parts(config, model)
    _check_unfreezing(plan, len(parts))
    schedule: LearningRate = head_schedule(config, plan, not parts)
    groups = [build_group(config, "head", model.head.trainable_variables, schedule, step)]
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
    """Builds a group with the optimizer that the config names for it; see `make_group`."""
    setting = "head_optimizer" if name == "head" else "backbone_optimizer"
    optimizer = getattr(config, setting)
    if is_python_reference(optimizer):
        build = load_from_file(setting, optimizer)
    else:
        build = OPTIMIZERS[optimizer]
        settings = set(inspect.signature(build).parameters) - {"learning_rate"}
        build = functools.partial(build, **{name: getattr(config, name) for name in settings})
    with failures_in_one_line(setting, optimizer, "call with a learning rate failed"):
        return make_group(name, variables, build, schedule, step, config.weight_decay)


def shape_of(setting: str, schedule: str) -> str | Shape:
    """Returns the name of a schedule in `SCHEDULES`, or the shape loaded from the user's file."""
    if not is_python_reference(schedule):
        return schedule
    found = load_from_file(setting, schedule)
    if isinstance(found, keras.optimizers.schedules.LearningRateSchedule):
        raise UserError(
            f"{setting} is {schedule!r}, which maps steps to learning rates; expected a function "
            "that maps the share of the training that is done, in [0, 1], to a factor of the rate"
        )
    with failures_in_one_line(setting, schedule, "call with a share of the steps failed"):
        factor = tf.function(found, autograph=False)(tf.constant(0.5))
    is_number = isinstance(factor, tf.Tensor) and (
        factor.dtype.is_floating or factor.dtype.is_integer
    )
    if not is_number or factor.shape.rank:
        shown = f"{factor.dtype.name} {factor.shape}" if isinstance(factor, tf.Tensor) else factor
        raise UserError(f"{setting} is {schedule!r}, which returns {shown}; expected one number")
    return Shape(found)


def _check_unfreezing(plan: Plan, parts: int) -> None:
    """Raises `UserError` if a part of the backbone would never be trained."""
    epochs = plan.epochs - plan.head_epochs
    between = plan.unfreezing_steps // plan.steps_per_epoch
    needed = (parts - 1) * between + 1
    if between and 0 < epochs < needed:
        raise UserError(
            f"gradual_unfreezing is {between} and epochs is {epochs}, but there are {parts} "
            f"stages to unfreeze, and the last one would begin in epoch {needed}; give at least "
            f"--epochs={needed}, a smaller --gradual_unfreezing, or a later --unfreeze_from"
        )


def head_schedule(config: TrainConfig, plan: Plan, is_only_group: bool) -> LearningRate:
    """Returns the head's schedule, in two phases if the backbone joins the training later."""
    peak, tuned = config.head_learning_rate, config.tuned_head_learning_rate
    warmup, shape = plan.warmup_steps, shape_of("head_schedule", config.head_schedule)
    if config.head_start == "regression" and not plan.head_steps:
        return Schedule(shape, tuned, 0, plan.steps, warmup)
    if is_only_group or plan.head_steps in (0, plan.steps):
        return Schedule(shape, peak, 0, plan.steps, warmup)
    return SequentialSchedule(
        Schedule(shape, peak, 0, plan.head_steps, warmup),
        Schedule(shape, tuned, plan.head_steps, plan.steps, warmup),
    )


def _backbone_parts(config: TrainConfig, model: Wrapper) -> list[tuple[str, list[keras.Variable]]]:
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
    """Returns the number of initial epochs that can be trained from cached features.

    These epochs train only the head, with a countable number of views per photo.
    """
    head_alone = len(groups) == 1 and loader.augmentation.views is not None
    return plan.epochs if head_alone else plan.head_epochs


def make_averages(config: TrainConfig, model: Wrapper) -> WeightAverages | None:
    """Returns averages of all trained weights, built in the caller's strategy scope.

    The moving statistics of BatchNorm are already averages, so they are not averaged again.

    Returns:
      None if the config does not ask for averages.
    """
    if not config.weight_averaging:
        return None
    return WeightAverages(model.trainable_variables, config.weight_averaging)


def make_loader(
    config: TrainConfig, source: Source, loaded: Mapping[str, SplitArrays] | None = None
) -> DataLoader:
    """Returns the loader of a run's photos, with the preprocessing of its backbone.

    Args:
      config: the run's settings.
      source: the photos.
      loaded: splits that are decoded already.

    Raises:
      UserError: the file of an augmentation cannot be imported.
    """
    loader = DataLoader(
        config.image_size,
        config.batch_size,
        source=source,
        preprocessing=find_backbone(config.backbone).preprocessing,
        shuffle_size=config.shuffle_size,
        steps_per_epoch=config.steps_per_epoch,
        seed=config.seed,
        augmentation=make_augmentation(config),
        mirror_averaging=config.mirror_averaging,
        resize=config.resize,
        photo_cache=PhotoCache(config.photo_cache, config.cache_dir),
        finishes_on_device=devices.has_gpu(),
    )
    loader.loaded.update(loaded or {})
    return loader


def make_augmentation(config: TrainConfig) -> AugmentationPipeline:
    """Returns the augmentations of training photos, in the order in which they are applied."""
    built_in = (
        (config.rand_augment, RandAugment(config.rand_augment)),
        (config.random_crop_area < 1, RandomCrop(config.random_crop_area)),
        (config.horizontal_flip, HorizontalFlip()),
        (config.colour_jitter, ColourJitter(config.colour_jitter)),
        (config.mixup or config.cutmix, Mixing(config.mixup, config.cutmix)),
    )
    own = [construct_from_file("augmentation", one, Augmentation) for one in config.augmentation]
    return AugmentationPipeline([one for used, one in built_in if used] + own)


def make_task(config: TrainConfig, kind: type[Task] | None = None) -> Task:
    """Returns a run's task. Its class weights are set later, by `set_class_weights`.

    Args:
      config: the run's settings.
      kind: the task class. None takes the one that the config names.

    Raises:
      UserError: the task's file cannot be imported, or the task's losses do not support a setting.
    """
    kind = kind or find_task(config.task)
    check_supported(config, kind)
    try:
        inspect.signature(kind).bind(label_smoothing=config.label_smoothing)
    except TypeError as error:
        raise UserError(
            f"the task {kind.__name__} cannot be constructed with label_smoothing ({error}); give "
            "its __init__ the arguments label_smoothing and class_weights of Task, with defaults"
        ) from error
    task = kind(label_smoothing=config.label_smoothing)
    found = getattr(task, "label_smoothing", None)
    if found != config.label_smoothing:
        raise UserError(
            f"label_smoothing is {config.label_smoothing}, but the task {kind.__name__} has "
            f"{found}; call super().__init__(label_smoothing, class_weights) in its "
            "__init__"
        )
    return task


def check_supported(config: TrainConfig, kind: type[Task]) -> None:
    """Raises `UserError` if the losses of a task do not support a setting."""
    values = {
        "label_smoothing": config.label_smoothing,
        "class_weights": config.class_weights != "none",
        "mixup": config.mixup,
        "cutmix": config.cutmix,
    }
    for name, value in values.items():
        if value and name not in kind.supports:
            raise UserError(
                f"{name} is {getattr(config, name)!r}, but the losses of {kind.__name__} do not "
                f"take it into account; leave out --{name}, or add it to {kind.__name__}.supports"
            )


def set_class_weights(task: Task, loader: DataLoader) -> None:
    """Sets class weights that balance the classes of the training photos.

    Raises:
      UserError: the labels are not those of the task.
    """
    labels = loader.examples("train").labels
    task.class_weights = task.balanced_weights(labels, len(loader.class_names))


def check_labels(task: Task, loader: DataLoader, splits: Sequence[str]) -> None:
    """Raises `UserError` if the labels of a split are not those that the task learns from."""
    for split in splits:
        labels = loader.examples(split).labels
        try:
            task.check_labels(labels, loader.class_names)
        except UserError as error:
            raise UserError(f"in the {split} split, {error}") from error
