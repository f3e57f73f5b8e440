"""The training loop: what happens in a run, in the order in which it happens."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from research import console, runtime
from research.checkpoint import Checkpoints
from research.config import TrainConfig
from research.errors import UserError
from research.learner import Learner, RunState, build_network, make_checkpoint, make_groups
from research.loader import DataLoader
from research.logbook import Logbook
from research.meter import Meter, Stopwatch
from research.plan import Plan, make_plan
from research.run_directory import RunDirectory, find_run
from research.sources import open_source
from research.steps import Network
from research.trunk_cache import cache_trunk, decide

STEPS_AN_INTERVAL = 10


class TrainingDivergedError(UserError):
    """The loss or a gradient is no finite number any more."""


def train(config: TrainConfig) -> RunDirectory:
    """Trains, or resumes, the run that a config describes, and returns its folder.

    Raises:
      UserError: a setting does not fit the data, the weights or the folder; or the loss became
        infinite or NaN (`TrainingDivergedError`), and the last good checkpoint stays.
    """
    directory, resuming = find_run(config)
    strategy = runtime.start(config)
    source = open_source(config.dataset, config.image_folder, config.data_dir)
    if resuming:
        directory.check_class_names(source.class_names)
    with strategy.scope():
        built = build_network(config, len(source.class_names))
    photos = DataLoader(
        config.image_size,
        config.batch_size,
        source=source,
        preprocessing=built.backbone.preprocessing,
        shuffle_size=config.shuffle_size,
        seed=config.seed,
        horizontal_flip=config.horizontal_flip,
    )
    plan = make_plan(config, photos.num_train_examples)
    with strategy.scope():
        state = RunState()
        groups = make_groups(config, built.network.model, state.step, plan)
    print(console.describe_run(config, photos, built, groups, strategy), flush=True)
    checkpoint = make_checkpoint(built.network.model, groups, state)
    checkpoints = Checkpoints(checkpoint, directory.checkpoints)
    data = describe_data(photos)
    if resuming:
        directory.check_data(data)
    # Restored first: what the trunk computes is to come from the weights that go on.
    resumed = resuming and checkpoints.restore_latest()
    cached = directory.read_data()["trunk_cached"] if resuming else None
    network, loader = run_trunk_once(config, built.network, photos, plan, cached)
    if not resuming:
        data = {**data, "trunk_cached": network.from_trunk}
        directory.create(config, photos.class_names, data)
    directory.keep_metrics_until(state.current_step)
    learner = Learner(strategy, network, groups, state)
    logbook = Logbook(directory, plan)
    if resumed:
        print(f"resuming after step {state.current_step} of {plan.steps}", flush=True)
    else:
        logbook.begin(config, photos)

    print(console.EPOCH_HEADER, flush=True)
    while state.current_step < plan.steps:
        train_epoch(config, learner, loader, plan, logbook, checkpoints)
    logbook.end(plan.steps)
    print(console.closing_lines(directory), flush=True)
    return directory


def describe_data(photos: DataLoader) -> dict[str, Any]:
    """Returns what tells a run's photos from others: their number and their names."""
    described: dict[str, Any] = {}
    for split in ("train", "validation"):
        names = photos.examples(split).names
        described[f"{split}_photos"] = len(names)
        described[f"{split}_names_sha256"] = hashlib.sha256("\n".join(names).encode()).hexdigest()
    return described


def run_trunk_once(
    config: TrainConfig, network: Network, photos: DataLoader, plan: Plan, cached: bool | None
) -> tuple[Network, DataLoader]:
    """Runs the frozen layers over all photos beforehand where that pays, and says so.

    Args:
      config: of the run.
      network: what the steps would compute with otherwise.
      photos: the run's photos.
      plan: its steps.
      cached: what a resumed run did; it goes on alike, to end with the same weights.

    Returns:
      What the steps compute with, and the loader of what they take.
    """
    splits = {split: photos.examples(split) for split in ("train", "validation")}
    number = sum(map(len, splits.values()))
    if cached is not None:
        config = dataclasses.replace(config, trunk_cache="memory" if cached else "off")
    decision = decide(config, network.parts, number, plan.visits)
    print(f"trunk cache  {decision.reason}", flush=True)
    if not decision.use:
        return network, photos
    loaded = cache_trunk(network.parts, splits, photos.preprocessing, config.batch_size)
    return dataclasses.replace(network, from_trunk=True), photos.with_examples(loaded)


def train_epoch(
    config: TrainConfig,
    learner: Learner,
    loader: DataLoader,
    plan: Plan,
    logbook: Logbook,
    checkpoints: Checkpoints,
) -> None:
    """Trains from where the run stands to the end of the epoch, validates, and saves.

    Raises:
      TrainingDivergedError: before anything that is not finite was saved.
    """
    state, stopwatch = learner.state, Stopwatch()
    step = state.current_step
    epoch, start = plan.position(step)
    end = (epoch + 1) * plan.steps_per_epoch
    batches = loader.epoch_batches(epoch, start).take(end - step)
    size = loader.largest_batch("train")
    meter = Meter(state.tally.read())
    with console.EpochProgress(epoch + 1, plan.epochs, plan.steps_per_epoch, start) as progress:
        for batch in meter.timed(runtime.feed(batches, size, learner.strategy)):
            norms = learner.train_step(batch, head_alone=epoch < plan.head_epochs)
            step += 1
            every = config.checkpoint_every
            saving = every is not None and step % every == 0
            if step % STEPS_AN_INTERVAL and step < end and not saving:
                continue  # fetching figures makes the host wait for the device
            sums = state.tally.read()
            check_finite(step, checkpoints, {"loss": sums.loss, **norms})
            logbook.interval(step, meter.interval(sums), scalars_of_groups(learner, step, norms))
            progress.show(step - (epoch * plan.steps_per_epoch), meter.epoch(sums))
            if saving and step < end:  # the last step's checkpoint follows the validation
                learner.average_statistics()
                state.seconds.assign_add(stopwatch.lap())
                checkpoints.save("latest", step)

    trained = meter.epoch(state.tally.read())
    learner.average_statistics()
    validation = learner.evaluate(
        runtime.feed(
            loader.validation_batches, loader.largest_batch("validation"), learner.strategy
        )
    )
    check_finite(step, checkpoints, {"validation loss": validation.loss})
    state.seconds.assign_add(stopwatch.lap())
    logbook.epoch(step, trained, validation, state.seconds.numpy())
    state.tally.reset()
    if validation.loss < state.best_loss.numpy():
        state.best_loss.assign(validation.loss)
        checkpoints.save("best", step)
    checkpoints.save("latest", step)


def scalars_of_groups(
    learner: Learner, step: int, norms: Mapping[str, tf.Tensor]
) -> dict[str, float]:
    """Returns the learning rate and gradient norm of each group updated at a step, by tag."""
    rates = {
        f"learning_rate/{group.name}": float(group.schedule(step - 1))
        for group in learner.groups
        if group.name in norms
    }
    return {**rates, **{f"gradient_norm/{name}": float(norm) for name, norm in norms.items()}}


def check_finite(
    step: int, checkpoints: Checkpoints, values: Mapping[str, float | tf.Tensor]
) -> None:
    """Raises `TrainingDivergedError` where a value is infinite or NaN."""
    for name, value in values.items():
        if not math.isfinite(float(value)):
            last = checkpoints.latest
            kept = f"the last good checkpoint is {last}" if last else "no checkpoint was written"
            raise TrainingDivergedError(
                f"the {name} became {float(value)} by step {step}; training stopped, {kept}; try "
                "lower learning rates, --warmup_steps, or --precision=float32"
            )
