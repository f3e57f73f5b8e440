"""The training loop: what happens in a run, in the order in which it happens."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path

import tensorflow as tf

from research import console, pictures, runtime
from research.agreement import check_settings
from research.cluster import find_cluster
from research.config import TrainConfig
from research.durations import parse_steps
from research.errors import UserError
from research.histograms import Histograms
from research.learner import Learner
from research.learning_rate_finder import find_learning_rates
from research.loader import DataLoader
from research.logbook import Logbook
from research.meter import Meter
from research.plan import Plan
from research.precompute import Feed
from research.preparation import begin_or_resume, set_up
from research.profiler import StepProfiler
from research.run_directory import RunDirectory, find_run
from research.run_state import RunState
from research.sources import Source, open_source
from research.team import Team


class TrainingDivergedError(UserError):
    """The loss or a gradient is no finite number any more."""


def train(config: TrainConfig, source: Source | None = None) -> RunDirectory | None:
    """Trains, or resumes, the run that a config describes.

    Args:
      config: of the run.
      source: photos to take instead of those that the config names.

    Returns:
      The run's folder; None on a worker of several hosts that is not the chief, and where only
      learning rates were to be found.

    Raises:
      UserError: a setting does not fit the data, the weights or the folder; the loss became
        infinite or NaN (`TrainingDivergedError`), and the last good checkpoint stays; or another
        worker ended (`WorkerLostError`).
    """
    cluster = find_cluster(config.distribution)
    # First of all, so that a folder that cannot be used is told of at once.
    leads = cluster is None or cluster.is_chief
    directory, resuming = find_run(config) if leads else (None, False)
    if config.find_learning_rate and cluster is not None:
        raise UserError(
            "find_learning_rate is asked for, but the environment variable TF_CONFIG names several "
            "workers; unset it, or give --distribution=none"
        )
    team = runtime.start(config, cluster)
    if config.find_learning_rate:
        suggest_learning_rates(config, team, directory, source)
        return None
    try:
        with team.watching():
            train_together(config, team, directory, resuming, source)
    except tf.errors.ResourceExhaustedError as error:
        raise UserError(
            f"the device has not enough memory for batches of {config.batch_size:,} photos of "
            f"{config.image_size} pixels; give a smaller --batch_size or --image_size, or "
            "--precision=bfloat16"
        ) from error
    return directory


def train_together(
    config: TrainConfig,
    team: Team,
    directory: RunDirectory | None,
    resuming: bool,
    source: Source | None = None,
) -> None:
    """Trains in this process and those of the team; the chief alone has a folder.

    Args:
      config: of the run.
      team: who trains.
      directory: the run's folder; None in a worker that is not the chief.
      resuming: whether there is a run in it to go on with.
      source: photos to take instead of those that the config names.
    """
    check_settings(config, TrainConfig.from_json(team.chiefs_word(config.to_json())))
    source = source or open_source(config.dataset, config.image_folder, config.data_dir)
    if directory and resuming:
        directory.check_class_names(source.class_names)
    run = set_up(config, team, source)
    print(
        console.describe_run(config, run.photos, run.built, run.groups, team, run.options.xla),
        flush=True,
    )
    logbook, feeds, resumed = begin_or_resume(run, directory, resuming)
    plan, state = run.plan, run.state

    every = config.histogram_every
    histograms = Histograms(directory.events / "train", every) if directory and every else None

    @functools.cache
    def learner_of(feed: Feed, trained: int) -> Learner:
        groups = run.groups[:trained]
        return Learner(
            team.strategy, feed.network, groups, state, run.options, run.averages, histograms
        )

    if resumed:
        logbook.resume(state.current_step)
    else:
        logbook.begin(config, run.photos)
    traced_steps = parse_steps(config.profile_steps) if directory else range(0)
    profiler = StepProfiler(traced_steps, directory.events / "train" if directory else Path())
    while state.current_step < plan.steps and not has_stalled(config, state):
        step = state.current_step
        feed = feeds.head if step < run.features_until * plan.steps_per_epoch else feeds.all
        begun = sum(group.schedule.first_step <= step for group in run.groups)
        train_epoch(config, learner_of(feed, begun), feed.loader, plan, logbook, profiler)
    stalled = int(state.epochs_without_gain.numpy())
    logbook.end(state.current_step, state.loss_scale.read().skipped_steps, stalled)


def suggest_learning_rates(
    config: TrainConfig, team: Team, directory: RunDirectory | None, source: Source | None
) -> None:
    """Finds learning rates, says them, and draws them beside where the run's folder would be."""
    source = source or open_source(config.dataset, config.image_folder, config.data_dir)
    sweeps = find_learning_rates(set_up(config, team, source))
    path = directory.path if directory else Path("run")
    file = path.with_name(f"{path.name}-learning-rates.png")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pictures.png(pictures.learning_rates(sweeps)))
    print(console.suggestions(sweeps, file), flush=True)


def has_stalled(config: TrainConfig, state: RunState) -> bool:
    """Tells whether to end early, as the validation loss no longer falls."""
    patience = config.early_stopping
    return patience is not None and int(state.epochs_without_gain.numpy()) >= patience


def train_epoch(
    config: TrainConfig,
    learner: Learner,
    loader: DataLoader,
    plan: Plan,
    logbook: Logbook,
    profiler: StepProfiler,
) -> None:
    """Trains from where the run stands to the end of the epoch, validates, and saves.

    Raises:
      TrainingDivergedError: before anything that is not finite was saved.
    """
    state = learner.state
    step = state.current_step
    epoch, start = plan.position(step)
    end = (epoch + 1) * plan.steps_per_epoch
    batches = iter(
        runtime.share_out(
            lambda share: loader.epoch_batches(epoch, start, share),
            learner.strategy,
            config.accumulate_steps,
        )
    )
    meter = Meter(state.tally.read())
    with console.EpochProgress(epoch + 1, plan.epochs, plan.steps_per_epoch, start) as progress:
        while step < end:
            every = (learner.steps_an_interval, config.checkpoint_every)
            stop = profiler.stop(step, plan.stop(step, *every))
            with profiler.traced(stop):
                done = learner.train_steps(batches, stop - step)
            step = stop
            meter.waited(done.waiting_seconds)
            saving = config.checkpoint_every is not None and step % config.checkpoint_every == 0
            if step % learner.steps_an_interval and step < end and not saving:
                continue  # fetching figures makes the host wait for the device
            sums = state.tally.read()
            figures = read_scalars(learner, step, done.scalars)
            check_finite(step, logbook, {"loss": sums.loss, **figures})
            logbook.interval(step, meter.interval(sums), figures)
            progress.show(step - (epoch * plan.steps_per_epoch), meter.epoch(sums))
            if saving and step < end:  # the last step's checkpoint follows the validation
                learner.average_statistics()
                state.count_seconds()
                logbook.save(step)

    trained = meter.epoch(state.tally.read())
    learner.average_statistics()
    validation = learner.evaluate(
        runtime.share_out(lambda share: loader.split_batches("validation", share), learner.strategy)
    )
    check_finite(step, logbook, {"validation loss": validation.loss})
    state.count_seconds()
    logbook.epoch(step, trained, validation, state.seconds.numpy())
    state.tally.reset()
    best = validation.loss < state.best_loss.numpy()
    if best:
        state.best_loss.assign(validation.loss)
        state.epochs_without_gain.assign(0)
    elif epoch >= plan.head_epochs:
        state.epochs_without_gain.assign_add(1)
    logbook.save(step, best)


def read_scalars(learner: Learner, step: int, scalars: Mapping[str, tf.Tensor]) -> dict[str, float]:
    """Fetches a step's scalars from the device, with the learning rates they came about by."""
    figures = {tag: float(value) for tag, value in scalars.items()}
    for group in learner.groups:
        if f"gradient_norm/{group.name}" in figures:
            figures[f"learning_rate/{group.name}"] = float(group.schedule(step - 1))
    loss_scale = learner.state.loss_scale
    if loss_scale.active:
        # Gradients that overflow once in a while are what the scale is for.
        figures = {tag: value for tag, value in figures.items() if math.isfinite(value)}
        scale, skipped_steps = loss_scale.read()
        # Below 1 it would only shrink what is small already: then the loss itself is the trouble.
        figures["loss_scale"] = scale if scale >= 1 else math.nan
        figures["skipped_steps"] = skipped_steps
    return figures


def check_finite(step: int, logbook: Logbook, values: Mapping[str, float]) -> None:
    """Raises `TrainingDivergedError` where a value is infinite or NaN."""
    for name, value in values.items():
        if not math.isfinite(value):
            last = logbook.last_checkpoint
            kept = f"the last good checkpoint is {last}" if last else "no checkpoint was written"
            raise TrainingDivergedError(
                f"the {name} became {value} by step {step}; training stopped, {kept}; try "
                "lower learning rates, a longer --warmup, or --precision=float32"
            )
