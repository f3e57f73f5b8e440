"""All that is built, restored and agreed on before a run's first step."""

from __future__ import annotations

import dataclasses

from research import runtime
from research.agreement import check_data, describe_data
from research.averages import WeightAverages
from research.builder import (
    BuiltNetwork,
    augmentation_of,
    build_network,
    follow_weights,
    make_groups,
    make_loader,
    make_loss,
)
from research.checkpoint import Checkpoints
from research.config import TrainConfig
from research.durations import parse_steps
from research.errors import UserError
from research.hyperrule import follow_hyperrule
from research.learner import StepOptions
from research.loader import DataLoader
from research.logbook import Logbook, SilentLogbook
from research.optimizers import Group
from research.plan import Plan, make_plan
from research.precompute import Feeds, FrozenLayers
from research.run_directory import RunDirectory
from research.run_state import RunState, make_checkpoint, variables_of
from research.sources import Source
from research.team import Team


@dataclasses.dataclass(frozen=True)
class Run:
    """What is trained, on what and for how long: all that is built before the first step.

    Attributes:
      config: the settings.
      team: who trains.
      built: the network.
      photos: what it is trained on.
      plan: the steps.
      groups: the parameter groups, in the order in which they begin.
      state: the clock and sums.
      averages: of the weights, None where none are kept.
      frozen: the layers that never change.
      features_until: the epoch until which the head is trained from features.
      options: how steps are computed.
    """

    config: TrainConfig
    team: Team
    built: BuiltNetwork
    photos: DataLoader
    plan: Plan
    groups: tuple[Group, ...]
    state: RunState
    averages: WeightAverages | None
    frozen: FrozenLayers
    features_until: int
    options: StepOptions


def set_up(config: TrainConfig, team: Team, source: Source) -> Run:
    """Builds what a config describes, on this process's devices."""
    strategy = team.strategy
    replicas = strategy.num_replicas_in_sync
    xla = runtime.resolve_xla(config, replicas)
    with strategy.scope():
        built = build_network(config, len(source.class_names))
    with team.chief_first():
        source.count("train")  # prepares a data set that is not there yet
    photos = make_loader(config, source, built)
    rules = follow_hyperrule(config, photos.num_train_examples)
    photos.augmentation = augmentation_of(rules)
    plan = make_plan(rules, photos.num_train_examples)
    check_traced_steps(config, plan)
    with strategy.scope():
        state = RunState()
        groups = make_groups(rules, built.network.model, state.step, plan)
        averages = follow_weights(config, built.network.model)
    head_alone = len(groups) == 1 and not rules.draws_without_end
    features_until = plan.epochs if head_alone else plan.head_epochs
    frozen = FrozenLayers(config, built.network, photos, plan, features_until, replicas)
    loss = make_loss(config, photos)
    options = StepOptions(config.accumulate_steps, config.clip_norm, xla, loss)
    return Run(
        config,
        team,
        built,
        photos,
        plan,
        groups,
        state,
        averages,
        frozen,
        features_until,
        options,
    )


def begin_or_resume(
    run: Run, directory: RunDirectory | None, resuming: bool
) -> tuple[Logbook, Feeds, bool]:
    """Brings all workers to where the chief stands, and runs the frozen layers.

    Returns:
      Where to write records; what the epochs take; and whether training goes on from a checkpoint.
    """
    model, team = run.built.network.model, run.team
    data = describe_data(run.photos)
    checkpoints, resumed, cached = None, False, None
    if directory:
        checkpoint = make_checkpoint(model, run.groups, run.state, run.averages)
        checkpoints = Checkpoints(checkpoint, directory.checkpoints, run.config.keep_checkpoints)
        if resuming:
            directory.check_data(data)
            cached = directory.read_data().get("cached")
            # Restored first: what the trunk computes is to come from the weights that go on.
            resumed = checkpoints.restore_latest()
    choices = run.frozen.choose(run.state.current_step, cached) if directory else []
    kept = {choice.phase.given: choice.decision.place is not None for choice in choices}
    chief = team.chiefs_word({"data": data, "resumed": resumed, "kept": kept})
    check_data(data, chief["data"])
    team.copy_from_chief(variables_of(model, run.groups, run.state, run.averages))
    if not directory:
        choices = run.frozen.choose(run.state.current_step, chief["kept"])
    feeds = run.frozen.run(choices)
    if directory is None or checkpoints is None:
        return SilentLogbook(run.plan), feeds, chief["resumed"]
    if not resuming:
        directory.create(run.config, run.photos.class_names, {**data, "cached": kept})
    return Logbook(directory, run.plan, checkpoints), feeds, resumed


def check_traced_steps(config: TrainConfig, plan: Plan) -> None:
    """Raises `UserError` unless the run has the steps that are to be traced."""
    traced = parse_steps(config.profile_steps)
    if traced and traced[-1] > plan.steps:
        raise UserError(
            f"profile_steps is {config.profile_steps!r}, but the run has {plan.steps:,} steps"
        )
