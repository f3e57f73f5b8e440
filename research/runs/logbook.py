"""Records a run: terminal output, checkpoints, metrics.jsonl, TensorBoard events and pictures."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from research.data.loader import DataLoader
from research.runs import console
from research.runs.checkpoints import Checkpoints
from research.runs.durable_files import write_file
from research.runs.histograms import Histograms
from research.runs.photo_grid import labelled_grid
from research.runs.run_directory import RunDirectory, best_epoch
from research.runs.summaries import Summaries
from research.runs.tracker import SafeTracker
from research.settings.train_config import TrainConfig

if TYPE_CHECKING:
    from research.loop.meter import Interval
    from research.loop.plan import Plan
    from research.tasks.metrics import Metrics


class Records:
    """Receives the metrics and events of a run. This base class discards them.

    Args:
      plan: the run's steps.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @property
    def last_checkpoint(self) -> str | None:
        """The path of the last complete checkpoint; None before the first."""
        return None

    def begin(self, config: TrainConfig, loader: DataLoader, figures: Sequence[str]) -> None:
        """Records the settings, a grid of raw photos, and the names of loss and metrics."""

    def resume(
        self, config: TrainConfig, figures: Sequence[str], step: int, validated: bool = True
    ) -> None:
        """Continues after a step, and drops the records of later steps.

        Args:
          config: the run's settings.
          figures: the names of loss and metrics.
          step: number of updates made.
          validated: False if the validation of this step has not finished.
        """

    def make_histograms(self, every: int | None) -> Histograms | None:
        """Returns a writer of histograms every `every` steps; None if `every` is None."""
        return None

    def interval(self, step: int, interval: Interval, scalars: dict[str, float]) -> None:
        """Writes the metrics, scalars and speed of the steps since the last call."""

    def epoch(
        self, step: int, interval: Interval, validation: Metrics | None, seconds: float
    ) -> None:
        """Prints and writes the metrics of an epoch.

        Args:
          step: number of updates made.
          interval: the epoch's metrics, and the speed of its steps made in this process.
          validation: the metrics of the validation split; None if it has no photos.
          seconds: time spent in the run, without work that was lost and repeated.
        """

    def save(self, step: int, best: bool = False, validated: bool = True) -> None:
        """Writes a checkpoint; see `Checkpoints.save`."""

    def resume_hint(self, step: int) -> str:
        """Returns the end of a message that says which step is saved and how to resume."""
        return f"; the chief saved step {step:,}: start all workers again to resume"

    def end(self, step: int, skipped_steps: int, epochs_without_gain: int = 0) -> None:
        """Draws the learning curves, and prints the result and the next commands."""


class Logbook(Records):
    """Writes the records of a run.

    Args:
      directory: the run's existing folder.
      plan: the run's steps.
      checkpoints: saves the run's state.
      tracker: also receives the records.
    """

    def __init__(
        self,
        directory: RunDirectory,
        plan: Plan,
        checkpoints: Checkpoints,
        tracker: SafeTracker | None = None,
    ) -> None:
        super().__init__(plan)
        self.directory = directory
        self.checkpoints = checkpoints
        self.tracker = tracker or SafeTracker(None)
        self.summaries = Summaries(directory.events, plan.validates)
        self.histograms: Histograms | None = None
        self._photos = 0

    def begin(self, config: TrainConfig, loader: DataLoader, figures: Sequence[str]) -> None:
        # A run killed between its first row and its first checkpoint starts over.
        self.directory.keep_metrics_until(0)
        self.directory.forget_result()
        self.summaries.restart(0)
        self.summaries.settings(config, self.directory.title, figures)
        raw = loader.get_random_raw_images(20)
        self._picture("photos", labelled_grid(raw, loader.class_names), 0)
        self.tracker.send("begin", dataclasses.asdict(config), str(self.directory.path))
        print(console.epoch_header(figures, self.plan.validates), flush=True)

    def resume(
        self, config: TrainConfig, figures: Sequence[str], step: int, validated: bool = True
    ) -> None:
        rows = self.directory.keep_metrics_until(step if validated else step - 1)
        self.summaries.restart(step, validated)
        self._photos = rows[-1].get("photos", 0) if rows else 0
        self.directory.forget_result()
        self.tracker.send("begin", dataclasses.asdict(config), str(self.directory.path))
        print(f"resuming after step {step} of {self.plan.steps}", flush=True)
        print(console.epoch_header(figures, self.plan.validates), flush=True)

    def save(self, step: int, best: bool = False, validated: bool = True) -> None:
        self.checkpoints.save(step, best, validated)

    def resume_hint(self, step: int) -> str:
        path = shlex.quote(console.short_path(self.directory.path))
        return (
            f"; step {step:,} of {self.plan.steps:,} is saved: repeat the command with "
            f"--ckpt_dir={path} to resume"
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
        values = {**interval.metrics.values, **scalars, **speed}
        self.summaries.scalars("train", step, values)
        self.tracker.send("interval", step, values)
        if self.histograms:
            self.histograms.flush()

    def epoch(
        self, step: int, interval: Interval, validation: Metrics | None, seconds: float
    ) -> None:
        epoch = step // self.plan.steps_per_epoch
        validated = validation.values if validation else {}
        if validated:
            self.summaries.scalars("validation", step, validated)
        self._photos += round(interval.metrics.photos)
        row = {
            "epoch": epoch,
            "step": step,
            "photos": self._photos,
            **{f"train_{name}": value for name, value in interval.metrics.values.items()},
            **{f"validation_{name}": value for name, value in validated.items()},
            "photos_per_second": interval.photos_per_second,
            "share_of_step_waiting_for_input": interval.waiting_share,
            "seconds": seconds,
        }
        self.directory.append_metrics(row)
        self.tracker.send("epoch", row)
        print(console.epoch_line(epoch, self.plan.epochs, interval, validation), flush=True)

    def end(self, step: int, skipped_steps: int, epochs_without_gain: int = 0) -> None:
        rows = self.directory.read_metrics()
        ended_early = step < self.plan.steps
        if ended_early:
            stalled = console.counted(epochs_without_gain, "epoch")
            print(f"\nnote: stopped early because the validation loss did not fall for {stalled}")
        if rows:
            result = result_of(rows)
            self.directory.write_result(result)
            self.summaries.finished()
            self.tracker.send("end", result)
        from research.runs import pictures  # Matplotlib takes 0.3 seconds to import

        self._picture("history", pictures.png(pictures.history(rows)), step)
        if skipped_steps:
            steps = console.counted(skipped_steps, "step")
            print(f"\nnote: {steps} of {step:,} skipped because gradients overflowed in float16")
        print(console.closing_lines(self.directory, ended_early), flush=True)

    def _picture(self, tag: str, png: bytes, step: int) -> None:
        write_file(self.directory.pictures / f"{tag}.png", png)
        self.summaries.picture(tag, png, step)


def result_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the content of result.json: the last epoch's row and the best validation metrics.

    Without validation photos, it is only the last epoch's row.
    """
    best = best_epoch(rows)
    if best is None:
        return rows[-1]
    validation = {f"best_{name}": best[name] for name in best if name.startswith("validation_")}
    return {**rows[-1], "best_epoch": best["epoch"], **validation}
