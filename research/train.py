"""The training loop: sets up a run, trains and validates each epoch, and saves checkpoints."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import tensorflow as tf

from research.data.loader import DataLoader
from research.data.order import share_out
from research.data.photo_cache import check_usable, without_damaged
from research.data.source import Source
from research.evaluation.evaluation_size import settle_evaluation_size
from research.loop.agreement import check_settings
from research.loop.finite_check import check_finite, read_scalars
from research.loop.learner import Learner
from research.loop.learning_rate_finder import suggest_learning_rates
from research.loop.meter import Interval, Meter
from research.loop.open_photos import photos_of_run
from research.loop.preparation import (
    Run,
    begin_or_resume,
    make_learner,
    raise_as_user_error,
    record_python_classes,
    set_up,
    with_earlier_choices,
)
from research.runs import console
from research.runs.find_run import find_run, has_checkpoint
from research.runs.logbook import Records
from research.runs.profiler import StepProfiler
from research.runs.run_directory import RunDirectory
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
    """Trains a run, or resumes it if its folder already holds it.

    Args:
      config: the run's settings.
      source: the photos. None opens those that the config names.
      task: the task class. None takes the one that the config names.

    Returns:
      The run's folder. None in a worker that is not the chief, and if `config.find_learning_rate`
      is set, because nothing is trained then.

    Raises:
      UserError: a setting does not fit the data, the weights or the folder; the folder is in use or
        cannot be written; the loss became infinite or NaN (`TrainingDivergedError`, the previous
        checkpoint is kept); or another worker ended (`WorkerLostError`).
      Interrupted: a signal requested a stop (only in the main thread); completed steps are saved.
    """
    config = record_python_classes(config, source, task)
    cluster = find_cluster(config.distribution)
    # Checked before the slow set-up, so that an unusable folder is reported at once.
    is_chief = cluster is None or cluster.is_chief
    directory, resuming = find_run(config) if is_chief else (None, False)
    if config.find_learning_rate and cluster is not None:
        raise UserError(
            "find_learning_rate is given, but there are several workers; give --distribution=none"
        )
    team = devices.start(config, cluster)
    try:
        if config.find_learning_rate:
            path = directory.path if directory else Path("run")
            run = set_up(config, team, source or photos_of_run(config, task), task)
            suggest_learning_rates(run, path.with_name(f"{path.name}-learning-rates.png"))
            return None
        if directory and resuming:
            directory.lock.acquire()
        with team.watching():
            train_together(config, team, directory, resuming, source, task)
    except tf.errors.OpError as error:
        raise_as_user_error(error, config)
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
    """Trains in this process, together with the other workers. Only the chief has a folder.

    Args:
      config, source, task: see `train`.
      team: this process and the other workers of the run.
      directory: the run's folder; None in a worker that is not the chief.
      resuming: whether the folder holds a run to continue.
    """
    own = [config.to_json(), python_files(config)]
    check_settings(own, team.from_chief(own))
    config = with_earlier_choices(config, team, directory if resuming else None)
    source = source or photos_of_run(config, task)
    if directory and resuming:
        directory.check_class_names(source.class_names)
    has_weights = directory is not None and resuming and has_checkpoint(directory)
    run = set_up(config, team, source, task, with_weights=not team.from_chief(has_weights))
    print(console.describe_run(run), flush=True)
    records, inputs, resumed = begin_or_resume(run, directory, resuming)
    get_learner = functools.cache(
        functools.partial(make_learner, run, records.make_histograms(config.histogram_every))
    )
    if resumed:
        validated = run.position.steps_done < run.plan.steps_per_epoch
        records.resume(run.config, run.figures, run.state.current_step, validated)
        if run.is_finished:
            print(console.finished_note(config, run.has_stalled), flush=True)
    else:
        records.begin(run.config, run.loader, run.figures)
    events = directory.events / "train" if directory else None
    profiler = StepProfiler(parse_steps(config.profile_steps), events)
    with deferred() as request:
        loop = Loop(run, records, profiler, StopRequest(team, request))
        while not run.is_finished:
            epoch = run.position.epoch
            epoch_input = inputs.for_epoch(epoch)
            first_step = epoch * run.plan.steps_per_epoch
            started = sum(group.schedule.first_step <= first_step for group in run.groups)
            with collected():
                loop.train_epoch(get_learner(epoch_input, started), epoch_input.loader)
        with team.chief_first():  # if the chief ends here, it needs the others to start again
            settle_evaluation_size(run, inputs.for_epoch(run.plan.epochs - 1), directory)
            stalled = int(run.state.epochs_without_gain.numpy())
            skipped = run.state.loss_scale.read().skipped_steps
            records.end(run.state.current_step, skipped, stalled)


@dataclasses.dataclass(frozen=True)
class Loop:
    """Trains a run epoch by epoch.

    Attributes:
      run: everything that `set_up` built.
      records: writes metrics and checkpoints.
      profiler: traces the steps of the setting `profile_steps`.
      stop: tells whether a signal requested a stop.
    """

    run: Run
    records: Records
    profiler: StepProfiler
    stop: StopRequest

    def train_epoch(self, learner: Learner, loader: DataLoader) -> None:
        """Trains to the end of the current epoch, validates, and saves a checkpoint.

        Raises:
          TrainingDivergedError: a value is infinite or NaN; the last checkpoint is kept.
          Interrupted: a signal requested a stop; all steps are saved.
        """
        run, state, records = self.run, self.run.state, self.records
        epoch = run.position.epoch
        trained = self.train_steps_of_epoch(learner, loader)
        learner.average_statistics()
        validation = self.validate(learner, loader) if run.plan.validates else None
        step = state.current_step
        state.count_seconds()
        records.epoch(step, trained, validation, float(state.seconds.numpy()))
        state.tally.reset()
        counts = run.counts_for_early_stopping(epoch)
        records.save(
            step, validation is not None and state.note_validation(validation.loss, counts)
        )
        number = self.stop.signal(all_ask=True)
        if number and not run.is_finished:
            raise Interrupted(number, records.resume_hint(step))

    def train_steps_of_epoch(self, learner: Learner, loader: DataLoader) -> Interval:
        """Runs the remaining training steps of an epoch.

        Returns:
          The metrics of the whole epoch, and the speed of the steps run in this call.

        Raises:
          TrainingDivergedError: a value is infinite or NaN; the last checkpoint is kept.
          UserError: all photos are damaged, which is only now known if they are read on demand.
          Interrupted: a signal requested a stop; all completed steps are saved.
        """
        run, state, records = self.run, self.run.state, self.records
        plan, save_every = run.plan, run.config.checkpoint_every
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
                due = plan.next_due(step, learner.steps_per_interval, save_every)
                end_of_call = self.profiler.limit(step, due)
                with self.profiler.traced(end_of_call):
                    done = learner.train_steps(batches, end_of_call - step, self.stop.is_asked)
                step += done.steps
                meter.waited(done.waiting_seconds)
                saving = save_every is not None and step % save_every == 0
                figures_due = step % learner.steps_per_interval == 0 or step == end
                if not (figures_due or saving or self.stop.is_asked()):
                    continue  # fetching figures would make the host wait for the device
                sums = state.tally.read()
                figures = read_scalars(learner, step, done.scalars)
                check_finite(step, records, {"loss": float(sums["loss"]), **figures})
                records.interval(step, meter.interval(sums), figures)
                progress.show(step - begin, meter.epoch(sums))
                number = self.stop.signal(all_ask=figures_due)
                if (saving or number) and step < end:  # the last step is saved after validation
                    learner.average_statistics()
                    state.count_seconds()
                    records.save(step)
                    if number:
                        raise Interrupted(number, records.resume_hint(step))
        check_usable("train", without_damaged(loader.examples("train")))
        return meter.epoch(state.tally.read())

    def validate(self, learner: Learner, loader: DataLoader) -> Metrics:
        """Returns the metrics of the validation split.

        Raises:
          TrainingDivergedError: the loss is infinite or NaN.
          Interrupted: a signal requested a stop; the steps before the validation are saved.
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
