"""The result of evaluating one checkpoint on one split: figures, and how they are written down."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from typing import Any

from research.evaluation.intervals import Interval
from research.evaluation.scores import ClassFigures, Decisions, Figure, Predictions
from research.runs.console import short_path

RULE = "-" * 40
TITLES = {
    "loss": "loss",
    "loss_at_temperature": "loss at temperature",
    "accuracy": "accuracy",
    "accuracy_at_threshold": "accuracy at threshold",
    "roc_auc": "area under ROC curve",
    "average_precision": "average precision",
    "calibration_error": "expected calibration error",
}
MOST_CLASSES_PRINTED = 40


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The figures of one checkpoint on one split.

    Attributes:
      ckpt_dir: the run's folder.
      backbone: its name.
      checkpoint: the path of what was evaluated, without ending.
      step: updates that it had seen.
      data: the data set or folder.
      split: which part of it.
      image_size: height and width in pixels at which.
      mirror_averaging: whether the logits are means over each photo and its mirror image.
      photos: how many photos were evaluated, each once.
      damaged: how many could not be decoded and are in no figure.
      figures: by name, see `scores.overall`.
      classes: the figures of each class.
      confusion: photos of the row's class that are predicted as the column's.
      decisions: what was chosen on validation photos; None where there were none to choose on.
      predictions: of each photo.
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
        """Share of photos classified rightly."""
        return self.figures["accuracy"].value

    def to_json(self) -> str:
        """Returns everything but the predictions as a JSON object, each figure by its name."""
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
        mirrored = ", also mirrored" if self.mirror_averaging else ""
        return "\n".join(
            [
                self.backbone,
                RULE,
                f"Loss: {self.loss:.2f}",
                f"Accuracy: {self.accuracy:.2f}",
                RULE,
                f"{self.photos:,} photos of {self.data}, {self.split} split",
                f"seen at {self.image_size} x {self.image_size} pixels{mirrored}",
                f"checkpoint after step {self.step:,}: {short_path(self.checkpoint)}",
                "",
                *self._overall_table(),
                "",
                *self._class_table(),
            ]
        )

    def _overall_table(self) -> list[str]:
        lines = [f"{'':<34}{'value':>8}   95 % interval"]
        for name in (*TITLES, *(name for name in self.figures if name not in TITLES)):
            if name in self.figures:
                figure, title = self.figures[name], TITLES.get(name, name.replace("_", " "))
                lines.append(
                    f"{title + self._chosen(name):<34}{figure.value:>8.4f}   "
                    f"{interval_text(figure.interval)}".rstrip()
                )
        return lines

    def _chosen(self, name: str) -> str:
        if self.decisions and name == "loss_at_temperature":
            return f" {self.decisions.temperature:.2f}"
        if self.decisions and name == "accuracy_at_threshold":
            return f" {self.decisions.threshold:.2f}"
        return ""

    def _class_table(self) -> list[str]:
        lines = [f"{'class':<16}{'photos':>6}  {'precision':<18}{'recall':<18}F1"]
        for one in self.classes[:MOST_CLASSES_PRINTED]:
            precision, recall, f1 = map(_in_short, (one.precision, one.recall, one.f1))
            lines.append(f"{one.name[:15]:<16}{one.photos:>6}  {precision:<18}{recall:<18}{f1}")
        left_out = len(self.classes) - MOST_CLASSES_PRINTED
        return [*lines, f"... and {left_out} classes more"] if left_out > 0 else lines


def interval_text(interval: Interval | None) -> str:
    """Returns an interval for people, nothing where there is none."""
    return f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else ""


def _in_short(figure: Figure) -> str:
    low_high = figure.interval
    return f"{figure.value:.2f}" + (f" ({low_high[0]:.2f}-{low_high[1]:.2f})" if low_high else "")


def predictions_csv(predictions: Predictions, class_names: tuple[str, ...]) -> str:
    """Returns a line a photo: file, label, predicted, and a probability and a logit.

    Of two classes those of the second; of more, a probability and a logit a class.
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
    for row, name in enumerate(predictions.names):
        numbers = [f"{float(value[row]):.9g}" for value in values]
        label, predicted = predictions.labels[row], predictions.predicted[row]
        writer.writerow([name, class_names[label], class_names[predicted], *numbers])
    return buffer.getvalue()
