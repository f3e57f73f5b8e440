"""What TensorBoard shows of a run. Train and validation share tags, and so their axes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorboard.plugins.hparams import api as hparams
from tensorboard.plugins.pr_curve import summary as pr_curve

from research.runs import dashboard
from research.runs.event_files import EventFiles
from research.settings.train_config import TrainConfig
from research.tasks.metrics import Metrics


class Summaries:
    """Writes event files for two TensorBoard runs, `train` and `validation`."""

    def __init__(self, folder: Path) -> None:
        self.files = EventFiles(folder)

    def train(self, step: int, metrics: Metrics, scalars: dict[str, float]) -> None:
        """Writes the task's figures since the last call, and other scalars by tag."""
        with self.files.at(step, "train"):
            _write_metrics(metrics)
            for tag, value in scalars.items():
                tf.summary.scalar(tag, value)

    def validation(self, step: int, metrics: Metrics) -> None:
        """Writes the task's figures of the validation split."""
        with self.files.at(step, "validation"):
            _write_metrics(metrics)

    def settings(self, config: TrainConfig, name: str, figures: Iterable[str]) -> None:
        """Writes the run's settings as a table, and to compare runs by; groups the figures.

        Args:
          config: the settings.
          name: what the run is called among others.
          figures: the names of loss and metrics.
        """
        with self.files.at(0):
            # Without `hparams_config`, TensorBoard shows first what differs between the runs.
            hparams.hparams(dashboard.settings_to_compare(config), trial_id=name)
            tf.summary.experimental.write_raw_pb(dashboard.layout(figures), 0)
        rows = [f"| {name} | `{value}` |" for name, value in dataclasses.asdict(config).items()]
        with self.files.at(0, "train"):
            tf.summary.text("settings", "\n".join(["| setting | value |", "| --- | --- |", *rows]))

    def picture(self, tag: str, png: bytes, step: int) -> None:
        """Writes a picture, given as the content of a PNG file."""
        with self.files.at(step, "train"):
            tf.summary.image(tag, tf.io.decode_png(png, channels=3)[tf.newaxis])

    def finished(self) -> None:
        """Writes that the run is finished."""
        with self.files.at(0):
            tf.summary.experimental.write_raw_pb(dashboard.finished(), 0)


class EvaluationSummaries:
    """Writes event files for the TensorBoard run of one evaluation.

    Args:
      folder: of the event files.
      step: updates that the evaluated checkpoint had seen.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._files = EventFiles(folder)
        self._step = step

    def figures(self, figures: dict[str, float]) -> None:
        """Writes figures by name; loss and accuracy share their axes with those of training."""
        with self._files.at(self._step):
            for tag, value in figures.items():
                tf.summary.scalar(tag, value)

    def picture(self, tag: str, png: bytes) -> None:
        """Writes a picture, given as the content of a PNG file."""
        with self._files.at(self._step):
            tf.summary.image(tag, tf.io.decode_png(png, channels=3)[tf.newaxis])

    def curve(self, tag: str, labels: np.ndarray, probabilities: np.ndarray) -> None:
        """Writes precision and recall at 127 thresholds, for the dashboard that moves along them.

        Args:
          tag: of the curve.
          labels: (photos,), 0 or 1.
          probabilities: of class 1, (photos,).
        """
        summary = pr_curve.pb(tag, labels, probabilities, num_thresholds=127)
        with self._files.at(self._step):
            tf.summary.experimental.write_raw_pb(summary.SerializeToString(), self._step)

    def close(self) -> None:
        """Makes what was written visible to TensorBoard."""
        self._files.close()


def _write_metrics(metrics: Metrics) -> None:
    for name, value in metrics.values.items():
        tf.summary.scalar(name, value)
