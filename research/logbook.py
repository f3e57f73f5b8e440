"""What a run writes down while it goes on: terminal lines, metrics.jsonl, events, pictures."""

from __future__ import annotations

from research import console, pictures
from research.config import TrainConfig
from research.loader import DataLoader
from research.meter import Interval
from research.metrics import Metrics
from research.plan import Plan
from research.run_directory import RunDirectory
from research.summaries import Summaries


class Logbook:
    """Writes down what happens in a run.

    Args:
      directory: the run's folder, which exists.
      plan: the run's steps.
    """

    def __init__(self, directory: RunDirectory, plan: Plan) -> None:
        self.directory = directory
        self.plan = plan
        self.summaries = Summaries(directory.events)

    def begin(self, config: TrainConfig, photos: DataLoader) -> None:
        """Writes the settings and the grid of raw photos."""
        self.summaries.settings(config)
        raw = photos.get_random_raw_images(20)
        grid = pictures.photo_grid([(photo, photos.get_label_name(label)) for photo, label in raw])
        self._picture("photos", pictures.png(grid), 0)

    def interval(self, step: int, interval: Interval, scalars: dict[str, float]) -> None:
        """Writes the figures of the steps since the last interval to TensorBoard."""
        speed = {
            "photos_per_second": interval.photos_per_second,
            "share_of_step_waiting_for_input": interval.waiting_share,
        }
        self.summaries.train(step, interval.metrics, {**scalars, **speed})

    def epoch(self, step: int, interval: Interval, validation: Metrics, seconds: float) -> None:
        """Prints and writes an epoch's figures.

        Args:
          step: updates made so far.
          interval: the epoch's training steps that this process made, and the epoch's metrics.
          validation: the metrics after the epoch.
          seconds: time spent in the run so far.
        """
        epoch = step // self.plan.steps_per_epoch
        self.summaries.validation(step, validation)
        self.summaries.flush()
        self.directory.append_metrics(
            {
                "epoch": epoch,
                "step": step,
                "train_loss": interval.metrics.loss,
                "train_accuracy": interval.metrics.accuracy,
                "validation_loss": validation.loss,
                "validation_accuracy": validation.accuracy,
                "photos_per_second": interval.photos_per_second,
                "share_of_step_waiting_for_input": interval.waiting_share,
                "seconds": seconds,
            }
        )
        print(console.epoch_line(epoch, self.plan.epochs, interval, validation), flush=True)

    def end(self, step: int) -> None:
        """Draws the training history."""
        self._picture(
            "history", pictures.png(pictures.history(self.directory.read_metrics())), step
        )

    def _picture(self, tag: str, png: bytes, step: int) -> None:
        (self.directory.pictures / f"{tag}.png").write_bytes(png)
        self.summaries.picture(tag, png, step)
        self.summaries.flush()
