"""The training loop: what happens in a run, in the order in which it happens."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import tensorflow as tf

from research.data.loader import DataLoader
from research.data.order import share_out
from research.data.source import Source
from research.loop.agreement import check_settings
from research.loop.finite_check import check_finite, read_scalars
from research.loop.learner import Learner
from research.loop.learning_rate_finder import suggest_learning_rates
from research.loop.meter import Interval, Meter
from research.loop.preparation import (
    Run,
    begin_or_resume,
    make_learner,
    open_photos,
    record_own_classes,
    set_up,
)
from research.runs import console
from research.runs.logbook import Records
from research.runs.profiler import StepProfiler
from research.runs.run_directory import RunDirectory, find_run
from research.settings.durations import parse_steps
from research.settings.train_config import TrainConfig, python_files
from research.system import devices
from research.system.cluster import find_cluster
from research.system.errors import UserError
from research.system.garbage import collected
from research.system.interruption import Interrupted, deferred
from research.system.stop_request import StopRequest
from research.system.team import Team
from research.tasks.metrics import Metrics
from research.tasks.task import Task


def train(
    config: TrainConfig, source: Source | None = None, task: type[Task] | None = None
) -> RunDirectory | None:
    """Trains, or resumes, the run that a config describes.

    Args:
      config: of the run.
      source: photos to take instead of those that the config names.
      task: what to learn instead of the task that the config names.

    Returns:
      The run's folder; None on a worker of several hosts that is not the chief, and where only
      learning rates were to be found.

    Raises:
      UserError: a setting does not fit the data, the weights or the folder; another process trains
        there, or it cannot be written; the loss became infinite or NaN (`TrainingDivergedError`),
        and the last good checkpoint stays; or another worker ended (`WorkerLostError`).
      Interrupted: a signal asked to stop, in the main thread; steps that were made are saved.
    """
    config = record_own_classes(config, source, task)
    cluster = find_cluster(config.distribution)
    # First, so that a folder that cannot be used is reported at once.
    leads = cluster is None or cluster.is_chief
    directory, resuming = find_run(config) if leads else (None, False)
    if config.find_learning_rate and cluster is not None:
        raise UserError(
            "find_learning_rate is given, but the environment variable TF_CONFIG names several "
            "workers; unset it, or give --distribution=none"
        )
    team = devices.start(config, cluster)
    try:
        if config.find_learning_rate:
            path = directory.path if directory else Path("run")
            run = set_up(config, team, source or open_photos(config), task)
            suggest_learning_rates(run, path.with_name(f"{path.name}-learning-rates.png"))
            return None
        if directory and resuming:
            directory.lock.acquire()
        with team.watching():
            train_together(config, team, directory, resuming, source, task)
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
    task: type[Task] | None = None,
) -> None:
    """Trains in this process and in those of the team. Only the chief has a folder.

    Args:
      config: of the run.
      team: this process and those that train with it.
      directory: the run's folder; None in a worker that is not the chief.
      resuming: whether the folder holds a run to continue.
      source: photos to take instead of those that the config names.
      task: what to learn instead of the task that the config names.
    """
    own = [config.to_json(), python_files(config)]
    check_settings(own, team.from_chief(own))
    source = source or open_photos(config)
    if directory and resuming:
        directory.check_class_names(source.class_names)
    run = set_up(config, team, source, task)
    print(console.describe_run(run), flush=True)
    records, inputs, resumed = begin_or_resume(run, config, directory, resuming)
    learner_of = functools.cache(
        functools.partial(make_learner, run, records.make_histograms(config.histogram_every))
    )

    if resumed:
        validated = run.position.steps_done < run.plan.steps_per_epoch
        records.resume(run.config, run.figures, run.state.current_step, validated)
    else:
        records.begin(run.config, run.loader, run.figures)
    traced_steps = parse_steps(config.profile_steps) if directory else range(0)
    profiler = StepProfiler(traced_steps, directory.events / "train" if directory else None)
    with deferred() as request:
        loop = Loop(run, records, profiler, StopRequest(team, request))
        while not run.is_finished:
            epoch = run.position.epoch
            epoch_input = inputs.for_epoch(epoch)
            first = epoch * run.plan.steps_per_epoch
            begun = sum(group.schedule.first_step <= first for group in run.groups)
            with collected():
                loop.train_epoch(learner_of(epoch_input, begun), epoch_input.loader)
        stalled = int(run.state.epochs_without_gain.numpy())
        skipped = run.state.loss_scale.read().skipped_steps
        records.end(run.state.current_step, skipped, stalled)


@dataclasses.dataclass(frozen=True)
class Loop:
    """Trains a run epoch by epoch.

    Attributes:
      run: all that was built.
      records: where figures and checkpoints are written.
      profiler: traces some steps.
      stop: whether a signal asked to stop.
    """

    run: Run
    records: Records
    profiler: StepProfiler
    stop: StopRequest

    def train_epoch(self, learner: Learner, loader: DataLoader) -> None:
        """Trains to the end of the current epoch, validates, and saves a checkpoint.

        Raises:
          TrainingDivergedError: a value is not finite; the last checkpoint is still good.
          Interrupted: a signal asked to stop; everything is saved.
        """
        run, state, records = self.run, self.run.state, self.records
        epoch = run.position.epoch
        trained = self.train_steps_of_epoch(learner, loader)
        learner.average_statistics()
        validation = self.validate(learner, loader)
        step = state.current_step
        state.count_seconds()
        records.epoch(step, trained, validation, state.seconds.numpy())
        state.tally.reset()
        is_best = state.note_validation(validation.loss, run.counts_for_early_stopping(epoch))
        records.save(step, is_best)
        number = self.stop.signal(all_ask=True)
        if number and not run.is_finished:
            raise Interrupted(number, records.resume_hint(step))

    def train_steps_of_epoch(self, learner: Learner, loader: DataLoader) -> Interval:
        """Makes the remaining steps of an epoch.

        Returns:
          The speed of the steps made here, and the metrics of the whole epoch.

        Raises:
          TrainingDivergedError: a value is not finite; the last checkpoint is still good.
          Interrupted: a signal asked to stop; the last step is saved.
        """
        run, state, records = self.run, self.run.state, self.records
        plan, every = run.plan, run.config.checkpoint_every
        step, (epoch, start) = state.current_step, run.position
        begin, end = epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch
        batches = iter(
            share_out(
                lambda share: loader.epoch_batches(epoch, start, share),
                learner.strategy,
                run.config.accumulate_steps,
            )
        )
        meter = Meter(state.tally.read(), learner.metrics)
        with console.EpochProgress(epoch + 1, plan.epochs, plan.steps_per_epoch, start) as progress:
            while step < end:
                due = plan.next_due(step, learner.steps_per_interval, every)
                pause = self.profiler.limit(step, due)
                with self.profiler.traced(pause):
                    done = learner.train_steps(batches, pause - step, self.stop.is_asked)
                step += done.number
                meter.waited(done.waiting_seconds)
                saving = every is not None and step % every == 0
                is_due = step % learner.steps_per_interval == 0 or step == end
                if not (is_due or saving or self.stop.is_asked()):
                    continue  # fetching figures makes the host wait for the device
                sums = state.tally.read()
                figures = read_scalars(learner, step, done.scalars)
                check_finite(step, records, {"loss": float(sums["loss"]), **figures})
                records.interval(step, meter.interval(sums), figures)
                progress.show(step - begin, meter.epoch(sums))
                number = self.stop.signal(all_ask=is_due)
                if (saving or number) and step < end:  # the last step's follows the validation
                    learner.average_statistics()
                    state.count_seconds()
                    records.save(step)
                    if number:
                        raise Interrupted(number, records.resume_hint(step))
        return meter.epoch(state.tally.read())

    def validate(self, learner: Learner, loader: DataLoader) -> Metrics:
        """Returns the metrics of the validation split.

        Raises:
          TrainingDivergedError: the loss is infinite or NaN.
          Interrupted: a signal asked to stop; the steps before the validation are saved.
        """
        state, records = self.run.state, self.records
        step = state.current_step
        batches = share_out(
            lambda share: loader.split_batches("validation", share), learner.strategy
        )
        try:
            validation = learner.evaluate(self.stop.until_asked(batches))
        except Interrupted as interrupted:
            state.count_seconds()
            records.save(step, validated=False)
            raise Interrupted(interrupted.number, records.resume_hint(step)) from None
        check_finite(step, records, {"validation loss": validation.loss})
        return validation
