"""What a run writes down while it goes on: terminal lines, metrics.jsonl, events, pictures."""

from __future__ import annotations

import abc
import dataclasses
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from research.data.loader import DataLoader
from research.runs import console, pictures
from research.runs.checkpoints import Checkpoints
from research.runs.durable_files import write_file
from research.runs.histograms import Histograms
from research.runs.run_directory import RunDirectory
from research.runs.summaries import Summaries
from research.runs.tracker import SafeTracker
from research.settings.train_config import TrainConfig

if TYPE_CHECKING:
    from research.tasks.metrics import Metrics
    from research.training.meter import Interval
    from research.training.plan import Plan


class Records(abc.ABC):
    """What is written down of a run: by one worker of a team; the others keep none."""

    plan: Plan

    @property
    @abc.abstractmethod
    def last_checkpoint(self) -> str | None:
        """The path of the last complete checkpoint, None before the first."""

    @abc.abstractmethod
    def begin(self, config: TrainConfig, loader: DataLoader, figures: Sequence[str]) -> None:
        """Writes the settings and the grid of raw photos.

        Args:
          config: the run's settings.
          loader: its photos.
          figures: the names of loss and metrics.
        """

    @abc.abstractmethod
    def resume(
        self, config: TrainConfig, figures: Sequence[str], step: int, validated: bool = True
    ) -> None:
        """Continues the records after a step. Later rows will be written again.

        Args:
          config: the run's settings.
          figures: the names of loss and metrics.
          step: updates made so far.
          validated: False where the validation of that step is still to come.
        """

    @abc.abstractmethod
    def make_histograms(self, every: int | None) -> Histograms | None:
        """Returns what writes histograms every so many steps; None if they are not asked for."""

    @abc.abstractmethod
    def interval(self, step: int, interval: Interval, scalars: dict[str, float]) -> None:
        """Writes the figures of the steps since the last interval to TensorBoard."""

    @abc.abstractmethod
    def epoch(self, step: int, interval: Interval, validation: Metrics, seconds: float) -> None:
        """Prints and writes an epoch's figures.

        Args:
          step: updates made so far.
          interval: the epoch's training steps that this process made, and the epoch's metrics.
          validation: the metrics after the epoch.
          seconds: time spent in the run so far, but for what was lost and done again.
        """

    @abc.abstractmethod
    def save(self, step: int, best: bool = False, validated: bool = True) -> None:
        """Writes a checkpoint; see `Checkpoints.save`."""

    @abc.abstractmethod
    def how_to_go_on(self, step: int) -> str:
        """Says that a step is saved, and how to resume; as the end of a line."""

    @abc.abstractmethod
    def end(self, step: int, skipped_steps: int, epochs_without_gain: int = 0) -> None:
        """Draws the training history and says how it went and what to do next."""


class Logbook(Records):
    """Keeps the records of a run: terminal lines, checkpoints, metrics.jsonl, events, pictures.

    Args:
      directory: the run's folder, which exists.
      plan: the run's steps.
      checkpoints: of the run.
      tracker: receives the records too.
    """

    def __init__(
        self,
        directory: RunDirectory,
        plan: Plan,
        checkpoints: Checkpoints,
        tracker: SafeTracker | None = None,
    ) -> None:
        self.directory = directory
        self.plan = plan
        self.checkpoints = checkpoints
        self.tracker = tracker or SafeTracker(None)
        self.summaries = Summaries(directory.events)
        self.histograms: Histograms | None = None
        self._photos = 0

    def begin(self, config: TrainConfig, loader: DataLoader, figures: Sequence[str]) -> None:
        # A run killed between its first row and its first checkpoint begins again.
        self.directory.keep_metrics_until(0)
        self.directory.forget_result()
        self.summaries.settings(config, self.directory.title, figures)
        raw = loader.get_random_raw_images(20)
        grid = pictures.photo_grid(
            [(photo, f"{_title(loader, label)}\n{photo.shape}") for photo, label in raw]
        )
        self._picture("photos", pictures.png(grid), 0)
        self.tracker.begin(dataclasses.asdict(config), str(self.directory.path))
        print(console.epoch_header(figures), flush=True)

    def resume(
        self, config: TrainConfig, figures: Sequence[str], step: int, validated: bool = True
    ) -> None:
        rows = self.directory.keep_metrics_until(step if validated else step - 1)
        self._photos = rows[-1].get("photos", 0) if rows else 0
        self.directory.forget_result()
        self.tracker.begin(dataclasses.asdict(config), str(self.directory.path))
        print(f"resuming after step {step} of {self.plan.steps}", flush=True)
        print(console.epoch_header(figures), flush=True)

    def save(self, step: int, best: bool = False, validated: bool = True) -> None:
        self.checkpoints.save(step, best, validated)

    def how_to_go_on(self, step: int) -> str:
        path = shlex.quote(console.short_path(self.directory.path))
        return (
            f"; step {step:,} of {self.plan.steps:,} is saved: repeat the command with "
            f"--ckpt_dir={path} to go on"
        )

    def make_histograms(self, every: int | None) -> Histograms | None:
        self.histograms = Histograms(self.summaries.files, every) if every else None
        return self.histograms

    @property
    def last_checkpoint(self) -> str | None:
        return self.checkpoints.latest

    def interval(self, step: int, interval: Interval, scalars: dict[str, float]) -> None:
        speed = {
            "photos_per_second": interval.photos_per_second,
            "share_of_step_waiting_for_input": interval.waiting_share,
        }
        self.summaries.train(step, interval.metrics, {**scalars, **speed})
        self.tracker.interval(step, {**interval.metrics.values, **scalars, **speed})
        if self.histograms:
            self.histograms.flush()

    def epoch(self, step: int, interval: Interval, validation: Metrics, seconds: float) -> None:
        epoch = step // self.plan.steps_per_epoch
        self.summaries.validation(step, validation)
        self._photos += round(interval.metrics.photos)
        row = {
            "epoch": epoch,
            "step": step,
            "photos": self._photos,
            **{f"train_{name}": value for name, value in interval.metrics.values.items()},
            **{f"validation_{name}": value for name, value in validation.values.items()},
            "photos_per_second": interval.photos_per_second,
            "share_of_step_waiting_for_input": interval.waiting_share,
            "seconds": seconds,
        }
        self.directory.append_metrics(row)
        self.tracker.epoch(row)
        print(console.epoch_line(epoch, self.plan.epochs, interval, validation), flush=True)

    def end(self, step: int, skipped_steps: int, epochs_without_gain: int = 0) -> None:
        rows = self.directory.read_metrics()
        ended_early = step < self.plan.steps
        if ended_early:
            stalled = console.counted(epochs_without_gain, "epoch")
            print(f"\nnote: ended early, as the validation loss did not fall for {stalled}")
        self._picture("history", pictures.png(pictures.history(rows)), step)
        if rows:
            result = result_of(rows)
            self.directory.write_result(result)
            self.summaries.finished()
            self.tracker.end(result)
        if skipped_steps:
            steps = console.counted(skipped_steps, "step")
            print(f"\nnote: {steps} of {step:,} skipped, whose gradients overflowed in float16")
        print(console.closing_lines(self.directory, ended_early), flush=True)

    def _picture(self, tag: str, png: bytes, step: int) -> None:
        write_file(self.directory.pictures / f"{tag}.png", png)
        self.summaries.picture(tag, png, step)


def result_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns what a run ends with, from rows of metrics.jsonl: its last and its best epoch."""
    best = min(rows, key=lambda row: row["validation_loss"])
    validated = {name: value for name, value in best.items() if name.startswith("validation_")}
    return {
        **rows[-1],
        "best_epoch": best["epoch"],
        **{f"best_{name}": value for name, value in validated.items()},
    }


def _title(loader: DataLoader, label: Any) -> str:
    """Returns the name of a class, or a label that is not the index of a class as it is."""
    return loader.get_label_name(label) if isinstance(label, int) else str(label)


class SilentLogbook(Records):
    """What a worker that is not the chief keeps: nothing.

    Args:
      plan: the run's steps.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @property
    def last_checkpoint(self) -> str | None:
        return None

    def begin(self, config: TrainConfig, loader: DataLoader, figures: Sequence[str]) -> None:
        pass

    def resume(
        self, config: TrainConfig, figures: Sequence[str], step: int, validated: bool = True
    ) -> None:
        pass

    def make_histograms(self, every: int | None) -> Histograms | None:
        return None

    def interval(self, step: int, interval: Interval, scalars: dict[str, float]) -> None:
        pass

    def epoch(self, step: int, interval: Interval, validation: Metrics, seconds: float) -> None:
        pass

    def save(self, step: int, best: bool = False, validated: bool = True) -> None:
        pass

    def how_to_go_on(self, step: int) -> str:
        return f"; the chief saved step {step:,}: start all workers again to go on"

    def end(self, step: int, skipped_steps: int, epochs_without_gain: int = 0) -> None:
        pass
