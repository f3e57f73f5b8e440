"""The training loop: what happens in a run, in the order in which it happens."""

from __future__ import annotations

import functools
from pathlib import Path

import tensorflow as tf

from research import runtime
from research.config import TrainConfig
from research.durations import parse_steps
from research.errors import UserError
from research.figures import check_finite, read_scalars
from research.hosts.agreement import check_settings
from research.hosts.cluster import find_cluster
from research.hosts.ending import Ending
from research.hosts.team import Team
from research.learner import Learner
from research.learning_rate_finder import find_learning_rates
from research.loader import DataLoader
from research.meter import Interval, Meter
from research.metrics import Metrics
from research.photos.source import Source
from research.photos.sources import open_source
from research.preparation import Run, begin_or_resume, set_up
from research.process.garbage import collected
from research.process.interruption import Interrupted, deferred
from research.reports import console, pictures
from research.reports.logbook import Records
from research.reports.profiler import StepProfiler
from research.storage.durable_files import write_file
from research.storage.run_directory import RunDirectory, find_run
from research.trunk.precompute import Feed


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
    try:
        if config.find_learning_rate:
            suggest_learning_rates(config, team, directory, source)
            return None
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
    histograms = logbook.make_histograms(config.histogram_every)

    @functools.cache
    def learner_of(feed: Feed, begun: int) -> Learner:
        return Learner(
            team.strategy,
            feed.network,
            run.groups[:begun],
            run.state,
            run.options,
            run.averages,
            histograms,
        )

    if resumed:
        validated = run.position.steps_done < run.plan.steps_per_epoch
        logbook.resume(run.state.current_step, validated)
    else:
        logbook.begin(run.config, run.photos)
    traced_steps = parse_steps(config.profile_steps) if directory else range(0)
    profiler = StepProfiler(traced_steps, directory.events / "train" if directory else None)
    with deferred() as request:
        ending = Ending(team, request)
        while not run.is_finished:
            epoch = run.position.epoch
            feed = feeds.for_epoch(epoch)
            first = epoch * run.plan.steps_per_epoch
            begun = sum(group.schedule.first_step <= first for group in run.groups)
            with collected():
                train_epoch(run, learner_of(feed, begun), feed.loader, logbook, profiler, ending)
        stalled = int(run.state.epochs_without_gain.numpy())
        skipped = run.state.loss_scale.read().skipped_steps
        logbook.end(run.state.current_step, skipped, stalled)


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


def train_epoch(
    run: Run,
    learner: Learner,
    loader: DataLoader,
    logbook: Records,
    profiler: StepProfiler,
    ending: Ending,
) -> None:
    """Trains from where the run stands to the end of the epoch, validates, and saves.

    Raises:
      TrainingDivergedError: before anything that is not finite was saved.
      Interrupted: after everything was saved.
    """
    state, epoch = run.state, run.position.epoch
    trained = train_steps_of_epoch(run, learner, loader, logbook, profiler, ending)
    learner.average_statistics()
    validation = validate(learner, loader, logbook, ending)
    step = state.current_step
    state.count_seconds()
    logbook.epoch(step, trained, validation, state.seconds.numpy())
    state.tally.reset()
    is_best = state.note_validation(validation.loss, run.counts_for_early_stopping(epoch))
    logbook.save(step, is_best)
    number = ending.signal(all_ask=True)
    if number and not run.is_finished:
        raise Interrupted(number, logbook.how_to_go_on(step))


def train_steps_of_epoch(
    run: Run,
    learner: Learner,
    loader: DataLoader,
    logbook: Records,
    profiler: StepProfiler,
    ending: Ending,
) -> Interval:
    """Makes the steps that are left of an epoch.

    Returns:
      The speed of the steps made here, and the metrics of all of the epoch.

    Raises:
      TrainingDivergedError: before anything that is not finite was saved.
      Interrupted: after the step was saved.
    """
    plan, state, every = run.plan, run.state, run.config.checkpoint_every
    step, (epoch, start) = state.current_step, run.position
    begin, end = epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch
    batches = iter(
        runtime.share_out(
            lambda share: loader.epoch_batches(epoch, start, share),
            learner.strategy,
            run.config.accumulate_steps,
        )
    )
    meter = Meter(state.tally.read())
    with console.EpochProgress(epoch + 1, plan.epochs, plan.steps_per_epoch, start) as progress:
        while step < end:
            pause = profiler.limit(step, plan.next_due(step, learner.steps_an_interval, every))
            with profiler.traced(pause):
                done = learner.train_steps(batches, pause - step, ending.is_asked)
            step += done.number
            meter.waited(done.waiting_seconds)
            saving = every is not None and step % every == 0
            due = step % learner.steps_an_interval == 0 or step == end
            if not (due or saving or ending.is_asked()):
                continue  # fetching figures makes the host wait for the device
            sums = state.tally.read()
            figures = read_scalars(learner, step, done.scalars)
            check_finite(step, logbook, {"loss": sums.loss, **figures})
            logbook.interval(step, meter.interval(sums), figures)
            progress.show(step - begin, meter.epoch(sums))
            number = ending.signal(all_ask=due)
            if (saving or number) and step < end:  # the last step's follows the validation
                learner.average_statistics()
                state.count_seconds()
                logbook.save(step)
                if number:
                    raise Interrupted(number, logbook.how_to_go_on(step))
    return meter.epoch(state.tally.read())


def validate(learner: Learner, loader: DataLoader, logbook: Records, ending: Ending) -> Metrics:
    """Returns the metrics of the validation split.

    Raises:
      TrainingDivergedError: the loss is infinite or NaN.
      Interrupted: after the steps before it were saved.
    """
    state, step = learner.state, learner.state.current_step
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
    return validation
