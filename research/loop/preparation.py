"""Builds or restores a run and compares its workers, before the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NoReturn

import keras
import numpy as np
import tensorflow as tf

from research.data.loader import DataLoader
from research.data.source import Source
from research.loop.agreement import SPLITS_OF_A_RUN, check_data, describe_data, list_photos
from research.loop.builder import (
    RANDOM,
    BuiltNetwork,
    build_model,
    check_labels,
    check_supported,
    divide_model,
    feature_epochs,
    make_averages,
    make_groups,
    make_loader,
    make_task,
    set_class_weights,
)
from research.loop.exchange import resolve_exchange
from research.loop.learner import Learner, StepOptions
from research.loop.pilot import Pilot
from research.loop.plan import Plan, Position, make_plan
from research.loop.run_state import RunState, make_checkpoint, variables_of
from research.loop.trunk.frozen_layers import EpochInput, FrozenLayers, RunInputs
from research.models.backbone import first_trainable_layer, suggest_first_layers
from research.models.backbone_table import find_backbone
from research.models.cost import largest_output
from research.models.wrapper import Wrapper
from research.optimization.averages import WeightAverages
from research.optimization.groups import Group
from research.runs.checkpoints import Checkpoints
from research.runs.histograms import Histograms
from research.runs.logbook import Logbook, Records
from research.runs.run_directory import RunDirectory
from research.runs.tracker import open_tracker
from research.settings.automatic import (
    Choice,
    choose,
    with_choices,
    without_auto,
)
from research.settings.durations import parse_steps
from research.settings.fields import AUTO
from research.settings.hyperrule import follow_hyperrule
from research.settings.train_config import TrainConfig
from research.system import devices
from research.system.errors import UserError, raised_in_pipeline
from research.system.garbage import release
from research.system.machine import free_memory
from research.system.python_file import reference_of
from research.system.team import Team
from research.tasks.checks import sum_shapes
from research.tasks.metrics import mean_metrics
from research.tasks.task import Task


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that is built before a run's first step.

    Attributes:
      config: the settings, including the values that the HyperRule chose.
      settled: the settings before the HyperRule, with the automatic choices.
      choices: the automatic choices.
      team: this process and the other workers of the run.
      task: head, losses and metrics.
      built: the network.
      loader: the photos.
      plan: the number of steps and epochs.
      groups: the parameter groups, in the order in which they begin to train.
      state: the step counter and running sums.
      averages: averages of the weights; None if the settings do not ask for them.
      frozen: the frozen layers, whose outputs can be cached.
      options: how steps are computed.
    """

    config: TrainConfig
    settled: TrainConfig
    choices: Mapping[str, Choice]
    team: Team
    task: Task
    built: BuiltNetwork
    loader: DataLoader
    plan: Plan
    groups: tuple[Group, ...]
    state: RunState
    averages: WeightAverages | None
    frozen: FrozenLayers
    options: StepOptions

    @property
    def figures(self) -> list[str]:
        """The names of the loss and the task's figures."""
        zeros = self.state.tally.empty_copy().read()
        return list(mean_metrics(zeros, self.task.figures).values)

    @property
    def position(self) -> Position:
        """The position from which to continue."""
        return self.plan.position(self.state.current_step, self.state.within_epoch)

    @property
    def is_finished(self) -> bool:
        """Whether all epochs are trained, or early stopping ended the run."""
        return self.has_stalled or self.position.epoch >= self.plan.epochs

    @property
    def has_stalled(self) -> bool:
        """Whether early stopping ended the run."""
        patience = self.config.early_stopping
        return patience is not None and int(self.state.epochs_without_gain.numpy()) >= patience

    def counts_for_early_stopping(self, epoch: int) -> bool:
        """Returns whether all groups are trained in an epoch, so that early stopping counts it."""
        beginnings = [group.schedule.first_step for group in self.groups]
        last_beginning = max(step for step in beginnings if step < self.plan.steps)
        return epoch * self.plan.steps_per_epoch >= last_beginning


def record_python_classes(
    config: TrainConfig, source: Source | None, task: type[Task] | None
) -> TrainConfig:
    """Returns the settings with a source and a task given as Python objects, as FILE.py:Class."""
    if source is not None and config.source is None:
        config = dataclasses.replace(
            config,
            source=reference_of(type(source)),
            dataset=TrainConfig.dataset,
            image_folder=None,
            labels=None,
            label_columns=None,
            label_pattern=None,
            folder_layout=TrainConfig.folder_layout,
            split=TrainConfig.split,
        )
    return dataclasses.replace(config, task=reference_of(task)) if task else config


def set_up(
    requested: TrainConfig,
    team: Team,
    source: Source,
    kind: type[Task] | None = None,
    with_weights: bool = True,
) -> Run:
    """Builds a run from its settings, on this process's devices.

    Args:
      requested: the settings before automatic choices and the HyperRule.
      team: this process and the other workers of the run.
      source: the photos.
      kind: the task class. None takes the one that the settings name.
      with_weights: whether to load the initial weights. A checkpoint replaces them on resuming, so
        that their file is not needed then.
    """
    strategy = team.strategy
    replicas = strategy.num_replicas_in_sync
    task = make_task(requested, kind)
    loader = make_loader(without_auto(requested), source)
    check_views(requested, loader)
    with strategy.scope():
        model, origin = build_model(requested, source.class_names, task, with_weights)
    with team.chief_first():
        source.count("train")  # prepares the data set if it is not prepared yet
    validates = check_validation(requested, source)
    check_memory(requested, model, source)
    # The learning rate finder does not use the validation photos, and need not decode them.
    check_labels(task, loader, SPLITS_OF_A_RUN[: 1 if requested.find_learning_rate else 2])
    has_random_weights = origin == RANDOM
    pilot = Pilot(model, loader, task, requested.seed)
    choices = choose_settings(requested, team, pilot, loader.num_train_examples, has_random_weights)
    settled = with_choices(requested, choices)
    config = follow_hyperrule(settled, loader.num_train_examples)
    if config != requested:
        check_supported(config, type(task))
        loader = make_loader(config, source, loader.loaded)
    if config.class_weights == "balanced":
        set_class_weights(task, loader)
    if config.head_start == "regression" and with_weights and team.leads:
        if pilot.regression_obstacle:
            raise UserError(
                f"head_start is 'regression', but {pilot.regression_obstacle}; leave out "
                "--head_start"
            )
        pilot.start_head(config.horizontal_flip, calibrated=trains_only_head(config, model))
    plan = make_plan(config, loader.num_train_examples, validates)
    check_traced_steps(config, plan)
    with strategy.scope():
        built = divide_model(config, model, origin)
    try_augmentation(loader)
    shapes = sum_shapes(task, model.logits, loader.train_batches.element_spec)
    model.check_variables(task)
    with strategy.scope():
        state = RunState(shapes)
        groups = make_groups(config, model, state.step, plan)
        averages = make_averages(config, model)
    frozen = FrozenLayers(
        built.network,
        loader,
        plan,
        feature_epochs(loader, plan, groups),
        config.trunk_cache,
        config.cache_dir,
        replicas,
    )
    communicates = exchange_within_step(config, task) if replicas > 1 else None
    xla = devices.resolve_xla(config.xla, communicates, plan.steps)
    exchange = resolve_exchange(config.exchange, replicas)
    deterministic = devices.is_deterministic()
    options = StepOptions(config.accumulate_steps, config.clip_norm, xla, deterministic, exchange)
    return Run(
        *(config, settled, choices, team, task, built, loader),
        *(plan, groups, state, averages, frozen, options),
    )


def try_augmentation(loader: DataLoader) -> None:
    """Changes two training photos, so that an augmentation that cannot do it fails here.

    In the input pipeline it would fail inside TensorFlow, after the run's folder is created.

    Raises:
      UserError: an augmentation draws or returns arrays of another shape or dtype.
    """
    photos = loader.examples("train").inputs[0]
    rows = np.arange(min(2, len(photos)))
    numbers = loader.augmentation.draw(len(rows), loader.seed, 0)
    loader.augmentation.change_pixels(photos.take(rows, axis=0), numbers)


def trains_only_head(config: TrainConfig, model: Wrapper) -> bool:
    """Returns whether no layer of the backbone is trained; False if `unfreeze_from` is `auto`."""
    first, layers = config.unfreeze_from, model.backbone.layers
    if first == AUTO:
        return False
    if not config.epochs:
        return True
    backbone = find_backbone(config.backbone)
    return first_trainable_layer(model.backbone, backbone, first) == len(layers)


def choose_settings(
    requested: TrainConfig, team: Team, pilot: Pilot, photos: int, is_random: bool
) -> dict[str, Choice]:
    """Returns the chief's choice for each setting with the value `auto`.

    Args:
      requested: the settings.
      team: this process and the other workers of the run.
      pilot: of the training photos.
      photos: number of training photos.
      is_random: whether the weights of the backbone are random, so that its features tell nothing.
    """
    random = "the weights of the backbone are random"
    model, backbone = pilot.model.backbone, find_backbone(requested.backbone)
    if trains_only_head(requested, pilot.model):
        requested = dataclasses.replace(requested, unfreeze_from="none")
    choices = (
        choose(
            requested,
            photos,
            suggest_first_layers(model, backbone),
            lambda: random if is_random else pilot.evidence(),
            pilot.cropped,
            lambda: random if is_random else pilot.regression_obstacle,
        )
        if team.leads
        else {}
    )
    return {name: Choice(*one) for name, one in team.from_chief(choices).items()}


def with_earlier_choices(
    config: TrainConfig, team: Team, directory: RunDirectory | None
) -> TrainConfig:
    """Returns the settings with the automatic choices of a run that is resumed.

    Args:
      config: the settings.
      team: this process and the other workers of the run.
      directory: the run's folder, on the chief; None for a new run.
    """
    found = directory.read_choices() if directory else {}
    if directory and config.epochs > directory.read_config().epochs:
        found.pop("evaluation_scale", None)  # chosen again at the end of the longer run
    earlier = team.from_chief(found)
    return with_choices(config, {name: Choice(*one) for name, one in earlier.items()})


def make_learner(
    run: Run, histograms: Histograms | None, epoch_input: EpochInput, started: int
) -> Learner:
    """Returns the learner that trains an epoch.

    Args:
      run: the run, as `set_up` returned it.
      histograms: writes histograms of weights and gradients; None for none.
      epoch_input: the network and the photos of the epoch.
      started: number of groups that are trained in the epoch.
    """
    return Learner(
        run.team.strategy,
        run.task,
        epoch_input.network,
        run.groups[:started],
        run.state,
        run.options,
        run.averages,
        histograms,
        epoch_input.loader.finish,
    )


def exchange_within_step(config: TrainConfig, task: Task) -> str | None:
    """Returns why devices exchange values in the forward or backward pass; None if they do not."""
    if config.bn_mode == "sync":
        return "bn_mode is 'sync'"
    return f"the task {type(task).__name__} exchanges values" if task.communicates else None


def begin_or_resume(
    run: Run, directory: RunDirectory | None, resuming: bool
) -> tuple[Records, RunInputs, bool]:
    """Restores or creates a run, sends the chief's state to all workers, and fills the caches.

    Args:
      run: the run, as `set_up` returned it.
      directory: the run's folder; None in a worker that is not the chief.
      resuming: whether the folder holds a run to continue.

    Returns:
      The records, the inputs of the epochs, and whether a checkpoint was restored.
    """
    model, team = run.built.network.model, run.team
    data, listed = describe_data(run.loader), list_photos(run.loader)
    checkpoints, resumed, cached = None, False, None
    if directory:
        checkpoint = make_checkpoint(model, run.groups, run.state, run.averages)
        checkpoints = Checkpoints(checkpoint, directory.checkpoints, run.config.keep_checkpoints)
        if resuming:
            directory.check_data(data, listed)
            cached = directory.read_data().get("cached")
            # Restored before the frozen layers run, because they need these weights.
            resumed = checkpoints.restore_latest()
            directory.update_config(run.settled)
    choices = (
        run.frozen.choose(run.state.current_step, cached)
        if directory and not run.is_finished
        else []
    )
    cached_now = {choice.phase.input_kind: choice.decision.place is not None for choice in choices}
    chief = team.from_chief({"data": data, "resumed": resumed, "cached": cached_now})
    check_data(data, chief["data"])
    team.copy_from_chief(variables_of(model, run.groups, run.state, run.averages))
    if not directory and not run.is_finished:
        choices = run.frozen.choose(run.state.current_step, chief["cached"])
    inputs = run.frozen.run(choices)
    if directory is None or checkpoints is None:
        return Records(run.plan), inputs, chief["resumed"]
    tracker = open_tracker(run.config.tracker)
    if not resuming:
        chosen = {
            name: value
            for name, value in dataclasses.asdict(run.config).items()
            if getattr(run.settled, name) != value
        }
        data = {**data, "cached": cached_now, "chosen_by_hyperrule": chosen}
        directory.create(run.settled, run.loader.class_names, data, listed, run.choices)
    return Logbook(directory, run.plan, checkpoints, tracker), inputs, resumed


def check_memory(config: TrainConfig, model: Wrapper, source: Source) -> None:
    """Raises `UserError` if one layer's output for a batch exceeds the free memory.

    Training needs more memory than this estimate. GPUs are not checked, because TensorFlow reports
    when their memory is exhausted.
    """
    if devices.has_gpu():
        return
    dtype = tf.as_dtype(keras.config.dtype_policy().compute_dtype)
    bytes_per_photo = largest_output(model.backbone.layers) * dtype.size
    batch = min(config.batch_size, source.count("train"))
    if batch * bytes_per_photo > free_memory():
        raise UserError(
            f"a layer of {find_backbone(config.backbone).name} returns "
            f"{batch * bytes_per_photo / 1e9:,.1f} GB for {batch:,} photos of {config.image_size} "
            f"pixels, and {free_memory() / 1e9:,.1f} GB are free; give a smaller --batch_size or "
            "--image_size"
        )


def check_validation(config: TrainConfig, source: Source) -> bool:
    """Returns whether there are validation photos.

    Raises:
      UserError: there are none, although early stopping needs them.
    """
    validates = source.count("validation") > 0
    if config.early_stopping and not validates:
        raise UserError(
            f"early_stopping is {config.early_stopping}, but the validation split has no photos; "
            "leave out --early_stopping, or give photos for validation"
        )
    return validates


def check_views(config: TrainConfig, loader: DataLoader) -> None:
    """Raises `UserError` if an endless augmentation has no epoch, or its outputs need a cache."""
    endless = loader.augmentation.endless
    if endless and not config.epochs:
        raise UserError(
            f"{endless} is given, but epochs is 0, and it begins after the epochs of the head "
            "alone; give --epochs and --unfreeze_from=none to train the head with it"
        )
    if endless and config.trunk_cache in ("memory", "disk"):
        raise UserError(
            f"trunk_cache is {config.trunk_cache!r}, but {endless} shows each photo differently in "
            "every epoch; give --trunk_cache=auto, or only --horizontal_flip, whose two views can "
            "be cached"
        )


def check_traced_steps(config: TrainConfig, plan: Plan) -> None:
    """Raises `UserError` if a step of `profile_steps` is after the last step of the run."""
    traced = parse_steps(config.profile_steps)
    if traced and traced[-1] > plan.steps:
        raise UserError(
            f"profile_steps is {config.profile_steps!r}, but the run has {plan.steps:,} steps"
        )


def raise_as_user_error(error: tf.errors.OpError, config: TrainConfig) -> NoReturn:
    """Raises `UserError` for an error of TensorFlow that a user can mend, and others unchanged.

    A user can mend that the device has not enough memory, and a `UserError` of the input pipeline.
    """
    if isinstance(error, tf.errors.ResourceExhaustedError):
        raise UserError(
            f"the device has not enough memory for batches of {config.batch_size:,} photos of "
            f"{config.image_size} pixels; give a smaller --batch_size or --image_size, "
            "--recompute=blocks, or --precision=bfloat16"
        ) from error
    raised = raised_in_pipeline(error)
    if raised:
        release(error)
    if raised and raised.is_user_error:
        raise UserError(raised.message) from error
    raise error
