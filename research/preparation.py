"""All that is built, restored and agreed on before a run's first step."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import tensorflow as tf

from research import runtime
from research.averages import WeightAverages
from research.builder import (
    BuiltNetwork,
    augmentation_of,
    build_network,
    feature_epochs,
    follow_weights,
    make_groups,
    make_loader,
    make_loss,
)
from research.checkpoint import Checkpoints
from research.config import TrainConfig
from research.durations import parse_steps
from research.errors import UserError
from research.hosts.agreement import check_data, describe_data, list_photos
from research.hosts.team import Team
from research.hyperrule import follow_hyperrule
from research.learner import StepOptions
from research.loader import DataLoader
from research.networks.cost import largest_output
from research.optimizers import Group
from research.photos.source import Source
from research.plan import Plan, Position, make_plan
from research.process.machine import free_memory
from research.reports.logbook import Logbook, Records, SilentLogbook
from research.run_state import RunState, make_checkpoint, variables_of
from research.storage.run_directory import RunDirectory
from research.trunk.precompute import Feeds, FrozenLayers


@dataclasses.dataclass(frozen=True)
class Run:
    """What is trained, on what and for how long: all that is built before the first step.

    Attributes:
      requested: the settings as they were given.
      config: the settings as they are followed: `requested`, but for what the HyperRule chooses.
      team: who trains.
      built: the network.
      photos: what it is trained on.
      plan: the steps.
      groups: the parameter groups, in the order in which they begin.
      state: the clock and sums.
      averages: of the weights, None where none are kept.
      frozen: the layers that never change.
      options: how steps are computed.
    """

    requested: TrainConfig
    config: TrainConfig
    team: Team
    built: BuiltNetwork
    photos: DataLoader
    plan: Plan
    groups: tuple[Group, ...]
    state: RunState
    averages: WeightAverages | None
    frozen: FrozenLayers
    options: StepOptions

    @property
    def position(self) -> Position:
        """Where to go on."""
        return self.plan.position(self.state.current_step, self.state.within_epoch)

    @property
    def is_finished(self) -> bool:
        """Whether all epochs are trained, or the validation loss no longer falls."""
        patience = self.config.early_stopping
        stalled = patience is not None and int(self.state.epochs_without_gain.numpy()) >= patience
        return stalled or self.position.epoch >= self.plan.epochs

    @property
    def chosen_by_hyperrule(self) -> dict[str, Any]:
        """The settings that are followed otherwise than they were given."""
        requested, followed = map(dataclasses.asdict, (self.requested, self.config))
        return {name: value for name, value in followed.items() if requested[name] != value}

    def counts_for_early_stopping(self, epoch: int) -> bool:
        """Tells whether all that is to be trained was trained in an epoch."""
        last_beginning = max(group.schedule.first_step for group in self.groups)
        return epoch * self.plan.steps_per_epoch >= last_beginning


def set_up(requested: TrainConfig, team: Team, source: Source) -> Run:
    """Builds what a config describes, on this process's devices."""
    strategy = team.strategy
    replicas = strategy.num_replicas_in_sync
    xla = runtime.resolve_xla(requested, replicas)
    with strategy.scope():
        built = build_network(requested, len(source.class_names))
    with team.chief_first():
        source.count("train")  # prepares a data set that is not there yet
    check_memory(requested, built, source)
    photos = make_loader(requested, source, built)
    config = follow_hyperrule(requested, photos.num_train_examples)
    photos = photos.with_augmentation(augmentation_of(config))
    plan = make_plan(config, photos.num_train_examples)
    check_traced_steps(config, plan)
    with strategy.scope():
        state = RunState()
        groups = make_groups(config, built.network.model, state.step, plan)
        averages = follow_weights(config, built.network.model)
    features_until = feature_epochs(config, plan, groups)
    frozen = FrozenLayers(config, built.network, photos, plan, features_until, replicas)
    loss = make_loss(config, photos)
    options = StepOptions(config.accumulate_steps, config.clip_norm, xla, loss)
    return Run(
        requested,
        config,
        team,
        built,
        photos,
        plan,
        groups,
        state,
        averages,
        frozen,
        options,
    )


def begin_or_resume(
    run: Run, directory: RunDirectory | None, resuming: bool
) -> tuple[Records, Feeds, bool]:
    """Brings all workers to where the chief stands, and runs the frozen layers.

    Returns:
      Where to write records; what the epochs take; and whether training goes on from a checkpoint.
    """
    model, team = run.built.network.model, run.team
    data, listed = describe_data(run.photos), list_photos(run.photos)
    checkpoints, resumed, cached = None, False, None
    if directory:
        checkpoint = make_checkpoint(model, run.groups, run.state, run.averages)
        checkpoints = Checkpoints(checkpoint, directory.checkpoints, run.config.keep_checkpoints)
        if resuming:
            directory.check_data(data, listed)
            cached = directory.read_data().get("cached")
            # Restored first: what the trunk computes is to come from the weights that go on.
            resumed = checkpoints.restore_latest()
    choices = (
        run.frozen.choose(run.state.current_step, cached)
        if directory and not run.is_finished
        else []
    )
    cached_now = {choice.phase.given: choice.decision.place is not None for choice in choices}
    chief = team.chiefs_word({"data": data, "resumed": resumed, "cached": cached_now})
    check_data(data, chief["data"])
    team.copy_from_chief(variables_of(model, run.groups, run.state, run.averages))
    if not directory and not run.is_finished:
        choices = run.frozen.choose(run.state.current_step, chief["cached"])
    feeds = run.frozen.run(choices)
    if directory is None or checkpoints is None:
        return SilentLogbook(run.plan), feeds, chief["resumed"]
    if not resuming:
        data = {**data, "cached": cached_now, "chosen_by_hyperrule": run.chosen_by_hyperrule}
        directory.create(run.requested, run.photos.class_names, data, listed)
    return Logbook(directory, run.plan, checkpoints), feeds, resumed


def check_memory(config: TrainConfig, built: BuiltNetwork, source: Source) -> None:
    """Raises `UserError` where a batch alone is more than the memory that is free.

    What training takes beyond that is not foreseen. On GPUs it is theirs that counts, of which
    TensorFlow tells when it is not enough.
    """
    if tf.config.list_logical_devices("GPU"):
        return
    number = keras.config.dtype_policy().compute_dtype
    bytes_a_photo = largest_output(built.network.model.backbone.layers) * tf.as_dtype(number).size
    batch = min(config.batch_size, source.count("train"))
    if batch * bytes_a_photo > free_memory():
        raise UserError(
            f"a layer of {config.backbone} puts out {batch * bytes_a_photo / 1e9:,.1f} GB for "
            f"{batch:,} photos of {config.image_size} pixels, and {free_memory() / 1e9:,.1f} GB "
            "are free; give a smaller --batch_size or --image_size"
        )


def check_traced_steps(config: TrainConfig, plan: Plan) -> None:
    """Raises `UserError` unless the run has the steps that are to be traced."""
    traced = parse_steps(config.profile_steps)
    if traced and traced[-1] > plan.steps:
        raise UserError(
            f"profile_steps is {config.profile_steps!r}, but the run has {plan.steps:,} steps"
        )
