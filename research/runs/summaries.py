"""Writes the TensorBoard summaries of a run and of its evaluations."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import summary as custom_scalar
from tensorboard.plugins.hparams import api as hparams
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams import summary as hparams_summary
from tensorboard.plugins.image import metadata as image_metadata
from tensorboard.plugins.pr_curve import summary as pr_curve

from research.runs.event_files import EventFiles
from research.settings.fields import setting_of
from research.settings.train_config import TrainConfig

# Charts of the custom scalars dashboard beside those of loss and metrics: tag patterns by title.
CHARTS = {
    "Optimizers": {
        "learning rate": [r"^learning_rate/"],
        "gradient norm": [r"^gradient_norm/"],
    },
    "Speed": {
        "photos per second": [r"^photos_per_second$"],
        "share of the time spent waiting for input": [r"^share_of_step_waiting_for_input$"],
    },
}


class Summaries:
    """Writes event files for the TensorBoard runs `train` and `validation`.

    Both use the same tags, so that TensorBoard draws them in the same charts.

    Args:
      folder: contains a folder for each.
      validates: whether there is a TensorBoard run `validation`.
    """

    def __init__(self, folder: Path, validates: bool = True) -> None:
        self.files = EventFiles(folder)
        self._validates = validates

    def scalars(self, split: str, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars by tag to the run `train` or `validation`."""
        with self.files.at(step, split):
            _write_scalars(values)

    def settings(self, config: TrainConfig, name: str, figures: Iterable[str]) -> None:
        """Writes the settings of a run called `name`, and the layout of charts for `figures`."""
        with self.files.at(0):
            # Without `hparams_config`, TensorBoard first shows the settings that differ.
            hparams.hparams(_settings_to_compare(config), trial_id=name)
            tf.summary.experimental.write_raw_pb(_layout(figures), 0)
        rows = [f"| {name} | `{value}` |" for name, value in dataclasses.asdict(config).items()]
        with self.files.at(0, "train"):
            tf.summary.text("settings", "\n".join(["| setting | value |", "| --- | --- |", *rows]))

    def restart(self, step: int, validated: bool = True) -> None:
        """Removes the events after a step; without `validated`, also those of its validation."""
        self.files.restart(step + 1, "train")
        if self._validates:
            self.files.restart(step + validated, "validation")

    def picture(self, tag: str, png: bytes, step: int) -> None:
        """Writes a picture, given as the content of a PNG file."""
        with self.files.at(step, "train"):
            _write_picture(tag, png)

    def finished(self) -> None:
        """Marks the run as finished in the HParams dashboard."""
        summary = hparams_summary.session_end_pb(api_pb2.STATUS_SUCCESS)
        with self.files.at(0):
            tf.summary.experimental.write_raw_pb(summary.SerializeToString(), 0)


class EvaluationSummaries:
    """Writes event files for the TensorBoard run of one evaluation.

    Args:
      folder: contains the event files.
      step: number of updates of the evaluated checkpoint.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._files = EventFiles(folder)
        self._step = step

    def figures(self, figures: dict[str, float]) -> None:
        """Writes scalars by tag; loss and accuracy appear in the charts of training."""
        with self._files.at(self._step):
            _write_scalars(figures)

    def picture(self, tag: str, png: bytes) -> None:
        """Writes a picture, given as the content of a PNG file."""
        with self._files.at(self._step):
            _write_picture(tag, png)

    def curve(self, tag: str, labels: np.ndarray, probabilities: np.ndarray) -> None:
        """Writes a precision-recall curve at 127 thresholds, for the PR curves dashboard.

        Args:
          tag: name of the curve.
          labels: shape (photos,), 0 or 1.
          probabilities: of class 1, shape (photos,).
        """
        summary = pr_curve.pb(tag, labels, probabilities, num_thresholds=127)
        with self._files.at(self._step):
            tf.summary.experimental.write_raw_pb(summary.SerializeToString(), self._step)

    def close(self) -> None:
        """Closes the files, so that TensorBoard shows their content."""
        self._files.close()


def _write_scalars(values: Mapping[str, float]) -> None:
    for tag, value in values.items():
        tf.summary.scalar(tag, value)


def _write_picture(tag: str, png: bytes) -> None:
    # tf.summary.image would encode the pixels again, which takes longer than drawing the picture.
    with Image.open(io.BytesIO(png)) as picture:
        width, height = picture.size
    metadata = image_metadata.create_summary_metadata(display_name=None, description=None)
    tf.summary.write(tag, tf.constant([str(width), str(height), png]), metadata=metadata)


def _settings_to_compare(config: TrainConfig) -> dict[str, str | float | bool]:
    """Returns the settings that change the result, as the HParams dashboard expects them."""
    settings: dict[str, str | float | bool] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if setting_of(field).changes_result and field.name != "data_dir":
            if isinstance(value, tuple):
                value = ", ".join(value) or None
            settings[field.name] = "none" if value is None else value
    return settings


def _layout(figures: Iterable[str]) -> bytes:
    """Returns the summary that lays out the custom scalars dashboard."""
    learning: dict[str, list[str]] = {}
    for name in figures:  # one chart for all classes, whose names are after the slash
        metric, _, of_class = name.partition("/")
        title = f"{metric} of each class" if of_class else name
        learning[title] = [f"^{re.escape(metric)}/" if of_class else f"^{re.escape(name)}$"]
    categories = [
        layout_pb2.Category(
            title=category,
            chart=[
                layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=tags))
                for title, tags in charts.items()
            ],
        )
        for category, charts in {"Learning": learning, **CHARTS}.items()
    ]
    return custom_scalar.pb(layout_pb2.Layout(category=categories)).SerializeToString()
