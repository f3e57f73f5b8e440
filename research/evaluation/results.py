"""The result of evaluating one checkpoint on one split, as text, JSON and CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from typing import Any

from research.evaluation.scores import (
    ClassFigures,
    ConfidenceInterval,
    Decisions,
    Figure,
    Predictions,
)
from research.runs.console import short_path

RULE = "-" * 40
TITLES = {"roc_auc": "area under ROC curve", "calibration_error": "expected calibration error"}
MAX_PRINTED_CLASSES = 40


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The metrics of one checkpoint on one split.

    Attributes:
      ckpt_dir: the run's folder.
      backbone: name of the backbone.
      checkpoint: path of the checkpoint without its file extension.
      step: number of updates before the checkpoint.
      data: the data set or folder.
      split: name of the split.
      image_size: height and width of the input in pixels.
      mirror_averaging: whether the logits are means over each photo and its mirror image.
      photos: number of evaluated photos.
      damaged: number of photos that could not be decoded; no metric includes them.
      leaked: number of evaluated photos that the run was trained on (`train`) and validated on
        (`validation`), although they are of another split or folder; without those that are 0.
      figures: metrics by name, see `scores.overall`.
      classes: metrics of each class.
      confusion: numbers of photos by true class (row) and predicted class (column).
      decisions: temperature and threshold; None if there were no validation photos to fit them on.
      predictions: the predictions for all photos.
    """

    ckpt_dir: str
    backbone: str
    checkpoint: str
    step: int
    data: str
    split: str
    image_size: int
    mirror_averaging: bool
    photos: int
    damaged: int
    leaked: dict[str, int]
    figures: dict[str, Figure]
    classes: tuple[ClassFigures, ...]
    confusion: tuple[tuple[int, ...], ...]
    decisions: Decisions | None
    predictions: Predictions

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        return self.figures["loss"].value

    @property
    def accuracy(self) -> float:
        """Share of correctly classified photos, in [0, 1]."""
        return self.figures["accuracy"].value

    def to_json(self) -> str:
        """Returns all fields but the predictions as a JSON object, each metric under its name."""
        fields: dict[str, Any] = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("figures", "predictions", "classes", "decisions")
        }
        figures = {name: dataclasses.asdict(figure) for name, figure in self.figures.items()}
        classes = [dataclasses.asdict(one) for one in self.classes]
        decisions = dataclasses.asdict(self.decisions) if self.decisions else None
        content = {**fields, **figures, "classes": classes, "decisions": decisions}
        return json.dumps(content, indent=2) + "\n"

    def __str__(self) -> str:
        mirrored = ", mean of photo and mirror image" if self.mirror_averaging else ""
        return "\n".join(
            [
                self.backbone,
                RULE,
                f"Loss: {self.loss:.2f}",
                f"Accuracy: {self.accuracy:.2f}",
                RULE,
                f"{self.photos:,} photos of {self.data}, {self.split} split",
                *self._leak_notes(),
                *self._note_on_classes(),
                f"input size: {self.image_size} x {self.image_size} pixels{mirrored}",
                f"checkpoint after step {self.step:,}: {short_path(self.checkpoint)}",
                "",
                *self._overall_table(),
                "",
                *self._class_table(),
            ]
        )

    def _leak_notes(self) -> list[str]:
        used = {"train": "trained", "validation": "validated"}
        return [
            f"note: {count:,} of these {self.photos:,} photos were {used[split]} on"
            for split, count in self.leaked.items()
        ]

    def _note_on_classes(self) -> list[str]:
        missing = [one.name for one in self.classes if not one.photos]
        shown = f"{', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''}"
        return [f"note: no photos of {shown}"] if missing else []

    def _overall_table(self) -> list[str]:
        lines = [f"{'':<34}{'value':>8}   95 % interval"]
        for name, figure in self.figures.items():
            title = TITLES.get(name, name.replace("_", " "))
            if self.decisions and name == "loss_at_temperature":
                title += f" {self.decisions.temperature:.2f}"
            if self.decisions and name == "accuracy_at_threshold":
                title += f" {self.decisions.threshold:.2f}"
            interval = interval_text(figure.interval)
            lines.append(f"{title:<34}{figure.value:>8.4f}   {interval}".rstrip())
        return lines

    def _class_table(self) -> list[str]:
        lines = [f"{'class':<16}{'photos':>6}  {'precision':<18}{'recall':<18}F1"]
        for one in self.classes[:MAX_PRINTED_CLASSES]:
            precision, recall, f1 = map(_short_text, (one.precision, one.recall, one.f1))
            lines.append(f"{one.name[:15]:<16}{one.photos:>6}  {precision:<18}{recall:<18}{f1}")
        left_out = len(self.classes) - MAX_PRINTED_CLASSES
        return [*lines, f"... and {left_out} more classes"] if left_out > 0 else lines


def interval_text(interval: ConfidenceInterval | None) -> str:
    """Returns an interval as text; an empty string for None."""
    return f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else ""


def _short_text(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    low_high = figure.interval
    return f"{figure.value:.2f}" + (f" ({low_high[0]:.2f}-{low_high[1]:.2f})" if low_high else "")


def predictions_csv(predictions: Predictions, class_names: tuple[str, ...]) -> str:
    """Returns CSV with one line per photo: file, label, prediction, probability and logit.

    With two classes, probability and logit are those of the second class. With more classes, there
    is one probability and one logit per class.
    """
    if predictions.logits.shape[1] == 1:
        columns = ["probability", "logit"]
        values = [*predictions.probabilities[:, 1:].T, *predictions.logits.T]
    else:
        columns = [f"{kind} {name}" for kind in ("probability", "logit") for name in class_names]
        values = [*predictions.probabilities.T, *predictions.logits.T]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["file", "label", "predicted", *columns])
    rows = zip(predictions.names, predictions.labels, predictions.predicted, *values, strict=True)
    for name, label, predicted, *numbers in rows:
        cells = [f"{float(number):.9g}" for number in numbers]
        writer.writerow([name, class_names[label], class_names[predicted], *cells])
    return buffer.getvalue()
