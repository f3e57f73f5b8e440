"""The training loop: what happens in a run, in the order in which it happens."""

from __future__ import annotations

import functools
from pathlib import Path

import tensorflow as tf

from research import console, pictures, runtime
from research.agreement import check_settings
from research.cluster import find_cluster
from research.config import TrainConfig
from research.durations import parse_steps
from research.ending import Ending
from research.errors import UserError
from research.figures import check_finite, read_scalars
from research.garbage import collected
from research.interruption import Interrupted, deferred
from research.learner import Learner
from research.learning_rate_finder import find_learning_rates
from research.loader import DataLoader
from research.logbook import Logbook
from research.meter import Meter
from research.plan import Plan
from research.precompute import Feed
from research.preparation import begin_or_resume, set_up
from research.profiler import StepProfiler
from research.run_directory import RunDirectory, find_run, write_file
from research.run_state import RunState
from research.sources import Source, open_source
from research.team import Team


def train(config: TrainConfig, source: Source | None = None) -> RunDirectory | None:
    """Trains, or resumes, the run that a config describes.

    Args:
      config: of the run.
      source: photos to take instead of those that the config names.

    Returns:
      The run's folder; None on a worker of several hosts that is not the chief, and where only
      learning rates were to be found.

    Raises:
      UserError: a setting does not fit the data, the weights or the folder; another process trains
        there, or it cannot be written; the loss became infinite or NaN (`TrainingDivergedError`),
        and the last good checkpoint stays; or another worker ended (`WorkerLostError`).
      Interrupted: a signal asked to end, in the main thread; where steps were made, they are saved.
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
        if directory and resuming:
            directory.lock.acquire()
        with team.watching():
            train_together(config, team, directory, resuming, source)
    except tf.errors.ResourceExhaustedError as error:
        raise UserError(
            f"the device has not enough memory for batches of {config.batch_size:,} photos of "
            f"{config.image_size} pixels; give a smaller --batch_size or --image_size, or "
            "--precision=bfloat16"
        ) from error
    finally:
        if directory:
            directory.lock.release()
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

    histograms = logbook.write_histograms(config.histogram_every)

    @functools.cache
    def learner_of(feed: Feed, trained: int) -> Learner:
        groups = run.groups[:trained]
        return Learner(
            team.strategy, feed.network, groups, state, run.options, run.averages, histograms
        )

    if resumed:
        _, start = next_position(plan, state)
        logbook.resume(state.current_step, validated=start < plan.steps_per_epoch)
    else:
        logbook.begin(config, run.photos)
    traced_steps = parse_steps(config.profile_steps) if directory else range(0)
    profiler = StepProfiler(traced_steps, directory.events / "train" if directory else Path())
    with deferred() as request:
        ending = Ending(team, request)
        while not is_finished(config, plan, state):
            epoch, _ = next_position(plan, state)
            feed = feeds.head if epoch < run.features_until else feeds.all
            first = epoch * plan.steps_per_epoch
            begun = sum(group.schedule.first_step <= first for group in run.groups)
            learner = learner_of(feed, begun)
            with collected():
                train_epoch(config, learner, feed.loader, plan, logbook, profiler, ending)
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
    write_file(file, pictures.png(pictures.learning_rates(sweeps)))
    print(console.suggestions(sweeps, file), flush=True)


def next_position(plan: Plan, state: RunState) -> tuple[int, int]:
    """Returns the epoch, from 0, and the batch in it to go on with.

    Behind an epoch's last batch stands a run that was interrupted before its validation.
    """
    epoch, start = plan.position(state.current_step)
    if start == 0 and state.within_epoch:
        return epoch - 1, plan.steps_per_epoch
    return epoch, start


def is_finished(config: TrainConfig, plan: Plan, state: RunState) -> bool:
    """Tells whether all epochs are trained, or the validation loss no longer falls."""
    epoch, _ = next_position(plan, state)
    patience = config.early_stopping
    stalled = patience is not None and int(state.epochs_without_gain.numpy()) >= patience
    return stalled or epoch >= plan.epochs


def train_epoch(
    config: TrainConfig,
    learner: Learner,
    loader: DataLoader,
    plan: Plan,
    logbook: Logbook,
    profiler: StepProfiler,
    ending: Ending,
) -> None:
    """Trains from where the run stands to the end of the epoch, validates, and saves.

    Raises:
      TrainingDivergedError: before anything that is not finite was saved.
      Interrupted: after everything was saved.
    """
    state = learner.state
    step = state.current_step
    epoch, start = next_position(plan, state)
    end = (epoch + 1) * plan.steps_per_epoch
    training = iter(
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
                done = learner.train_steps(training, stop - step, ending.is_asked)
            step += done.number
            meter.waited(done.waiting_seconds)
            saving = config.checkpoint_every is not None and step % config.checkpoint_every == 0
            due = step % learner.steps_an_interval == 0 or step == end
            if not (due or saving or ending.is_asked()):
                continue  # fetching figures makes the host wait for the device
            sums = state.tally.read()
            figures = read_scalars(learner, step, done.scalars)
            check_finite(step, logbook, {"loss": sums.loss, **figures})
            logbook.interval(step, meter.interval(sums), figures)
            progress.show(step - (epoch * plan.steps_per_epoch), meter.epoch(sums))
            number = ending.signal(all_ask=due)
            if (saving or number) and step < end:  # the last step's follows the validation
                learner.average_statistics()
                state.count_seconds()
                logbook.save(step)
                if number:
                    raise Interrupted(number, logbook.how_to_go_on(step))

    trained = meter.epoch(state.tally.read())
    learner.average_statistics()
    batches = runtime.share_out(
        lambda share: loader.split_batches("validation", share), learner.strategy
    )
    try:
        validation = learner.evaluate(ending.until_asked(batches))
    except Interrupted as interrupted:
        state.count_seconds()
        logbook.save(step, validated=False)
        raise Interrupted(interrupted.number, logbook.how_to_go_on(step)) from None
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
    number = ending.signal(all_ask=True)
    if number and not is_finished(config, plan, state):
        raise Interrupted(number, logbook.how_to_go_on(step))
