"""What TensorBoard shows of a run. Train and validation share tags, and so their axes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tensorflow as tf

from research.config import TrainConfig
from research.metrics import Metrics


class Summaries:
    """Writes event files for two TensorBoard runs, `train` and `validation`."""

    def __init__(self, folder: Path) -> None:
        self._train = tf.summary.create_file_writer(str(folder / "train"))
        self._validation = tf.summary.create_file_writer(str(folder / "validation"))

    def train(self, step: int, metrics: Metrics, scalars: dict[str, float]) -> None:
        """Writes loss and accuracy since the last call, and other scalars by tag."""
        with self._train.as_default(step):
            _write_metrics(metrics)
            for tag, value in scalars.items():
                tf.summary.scalar(tag, value)

    def validation(self, step: int, metrics: Metrics) -> None:
        """Writes the loss and accuracy of the validation split."""
        with self._validation.as_default(step):
            _write_metrics(metrics)

    def settings(self, config: TrainConfig) -> None:
        """Writes the run's settings as a table."""
        rows = [f"| {name} | `{value}` |" for name, value in dataclasses.asdict(config).items()]
        with self._train.as_default(0):
            tf.summary.text("settings", "\n".join(["| setting | value |", "| --- | --- |", *rows]))

    def picture(self, tag: str, png: bytes, step: int) -> None:
        """Writes a picture, given as the content of a PNG file."""
        with self._train.as_default(step):
            tf.summary.image(tag, tf.io.decode_png(png, channels=3)[tf.newaxis])

    def flush(self) -> None:
        """Makes what was written visible to TensorBoard."""
        self._train.flush()
        self._validation.flush()


def _write_metrics(metrics: Metrics) -> None:
    tf.summary.scalar("loss", metrics.loss)
    tf.summary.scalar("accuracy", metrics.accuracy)
