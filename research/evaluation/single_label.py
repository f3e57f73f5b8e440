"""The evaluation of single-label classification."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure as Plot

from research.evaluation import figures as drawn
from research.evaluation.calibration import decide
from research.evaluation.results import Scores, limited, short_text
from research.evaluation.scores import (
    ClassFigures,
    Decisions,
    Predictions,
    Resamples,
    confusion,
    of_classes,
    overall,
)
from research.evaluation.variant import Shown, Variant
from research.system.printable import csv_line
from research.tasks.labels import check_class_indices

TITLES = {"roc_auc": "area under ROC curve", "calibration_error": "expected calibration error"}


@dataclasses.dataclass(frozen=True)
class MatrixEntry:
    """An entry of the confusion matrix: a label, a predicted class, and the number of photos."""

    label: str
    predicted: str
    photos: int


@dataclasses.dataclass(frozen=True)
class SingleLabelScores(Scores):
    """The metrics of single-label predictions.

    Attributes:
      figures: see `scores.overall`.
      classes: see `scores.of_classes`.
      decisions: temperature and threshold; None if there were no validation photos to fit them on.
      confusion: the pairs of a label and a predicted class that photos have.
    """

    headline = "accuracy"

    classes: tuple[ClassFigures, ...]
    decisions: Decisions | None
    confusion: tuple[MatrixEntry, ...]

    def title(self, name: str) -> str:
        title = TITLES.get(name, name.replace("_", " "))
        if self.decisions and name == "loss_at_temperature":
            title += f" {self.decisions.temperature:.2f}"
        if self.decisions and name == "accuracy_at_threshold":
            title += f" {self.decisions.threshold:.2f}"
        return title

    def class_table(self) -> list[str]:
        lines = [f"{'class':<16}{'photos':>6}  {'precision':<18}{'recall':<18}F1"]
        for one in self.classes:
            precision, recall, f1 = map(short_text, (one.precision, one.recall, one.f1))
            lines.append(f"{one.name[:15]:<16}{one.photos:>6}  {precision:<18}{recall:<18}{f1}")
        missing = [one.name for one in self.classes if not one.photos]
        shown = f"{', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''}"
        worst = [one.f1.value if one.f1 else math.inf for one in self.classes]
        return [*limited(lines, worst, "F1"), *([f"note: no photos of {shown}"] if missing else [])]


class SingleLabel(Variant[Predictions, SingleLabelScores]):
    """Evaluates one label per photo."""

    built_in_figures = frozenset({"accuracy", "cross_entropy"})

    def check_labels(self, labels: np.ndarray) -> None:
        check_class_indices(labels, len(self.class_names))

    def predictions(
        self, names: tuple[str, ...], labels: np.ndarray, logits: np.ndarray
    ) -> Predictions:
        return Predictions(names, labels, logits)

    def decide(self, validation: Predictions) -> Decisions:
        return decide(validation)

    def score(
        self, predictions: Predictions, decisions: Decisions | None, resamples: int
    ) -> SingleLabelScores:
        names = self.class_names
        pairs, numbers = confusion(predictions.labels, predictions.predicted)
        return SingleLabelScores(
            overall(predictions, decisions, resamples=resamples),
            of_classes(predictions, names, resamples),
            decisions,
            tuple(
                MatrixEntry(names[label], names[said], int(number))
                for (label, said), number in zip(pairs, numbers, strict=True)
            ),
        )

    def differences(
        self, one: Predictions, other: Predictions, rows: Resamples
    ) -> dict[str, tuple[float, Sequence[float]]]:
        differences = {
            "accuracy": one.correct.astype(float) - other.correct,
            "loss": one.losses() - other.losses(),
        }
        return {
            name: (float(values.mean()), [values[drawn].mean() for drawn in rows])
            for name, values in differences.items()
        }

    def csv(self, predictions: Predictions, decisions: Decisions | None) -> str:
        """Returns CSV with one line per photo: file, label, prediction, probability and logit.

        With two classes, probability and logit are those of the second class. With more classes,
        there is one probability and one logit per class.
        """
        if predictions.logits.shape[1] == 1:
            columns = ["probability", "logit"]
            values = [*predictions.probabilities[:, 1:].T, *predictions.logits.T]
        else:
            kinds = ("probability", "logit")
            columns = [f"{kind} {name}" for kind in kinds for name in self.class_names]
            values = [*predictions.probabilities.T, *predictions.logits.T]
        names = self.class_names
        labels = [
            (names[label], names[predicted])
            for label, predicted in zip(predictions.labels, predictions.predicted, strict=True)
        ]
        return csv_of(predictions.names, labels, columns, values)

    def plots(self, predictions: Predictions, scores: SingleLabelScores) -> dict[str, Plot]:
        names, calibrated = self.class_names, [_calibrated("as trained", predictions)]
        if scores.decisions:
            logits = predictions.logits / scores.decisions.temperature
            tempered = Predictions(predictions.names, predictions.labels, logits)
            calibrated.append(_calibrated("after temperature scaling", tempered))
        plots = {
            "confusion_matrix": drawn.confusion_matrix(predictions, names),
            "reliability": drawn.reliability(
                calibrated,
                1 / predictions.classes,
                "confidence: probability of the predicted class",
                "accuracy",
                "photos",
            ),
        }
        if curves := self.curves(predictions):
            plots["roc_curve"] = drawn.roc_curves(curves, len(names))
            plots["precision_recall_curve"] = drawn.precision_recall_curves(curves, len(names))
        return plots

    def curves(self, predictions: Predictions) -> list[drawn.Curve]:
        return drawn.one_against_rest(predictions, self.class_names)

    def curve_tag(self, curve: drawn.Curve) -> str:
        return super().curve_tag(curve) if len(self.class_names) > 2 else "precision_recall"

    def shown(self, predictions: Predictions, decisions: Decisions | None) -> Shown:
        """Returns the misclassified photos with the highest confidence."""
        rows = drawn.most_confident_mistakes(predictions)
        titles = drawn.mistake_titles(rows, predictions, self.class_names)
        return Shown("mistakes", rows, titles, predictions.predicted[rows])


def csv_of(
    names: Sequence[str],
    labels: Sequence[tuple[str, str]],
    columns: Sequence[str],
    values: Sequence[np.ndarray],
) -> str:
    """Returns CSV with one line per photo.

    Args:
      names: of the photos.
      labels: the label and the prediction of each photo.
      columns: names of the other columns.
      values: float (photos,) for each of these columns.
    """
    lines = [csv_line(["file", "label", "predicted", *columns])]
    for name, both, *numbers in zip(names, labels, *values, strict=True):
        lines.append(csv_line([name, *both, *(f"{float(number):.9g}" for number in numbers)]))
    return "".join(lines)


def _calibrated(title: str, predictions: Predictions) -> drawn.Calibrated:
    return drawn.Calibrated(title, predictions.confidence, predictions.correct)
