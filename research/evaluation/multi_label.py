"""The evaluation of tasks with several labels per photo."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure as Plot

from research.evaluation import figures as drawn
from research.evaluation.classifier import Classifier
from research.evaluation.multi_label_figures import class_bars
from research.evaluation.multi_label_scores import LabelFigures, LabelPredictions, score
from research.evaluation.ranking import areas_of_classes, mean_of_known
from research.evaluation.results import Scores, limited, short_text
from research.evaluation.scores import Resamples
from research.evaluation.single_label import csv_of
from research.evaluation.thresholds import (
    Thresholds,
    default_thresholds,
    fit_threshold,
    write_thresholds,
)
from research.evaluation.variant import Shown, Variant
from research.runs.photo_grid import plain, shortened
from research.tasks.labels import check_label_vectors, joined, label_vectors

TITLES = {
    "average_precision": "mean average precision",
    "roc_auc": "mean area under ROC curve",
    "micro_roc_auc": "micro area under ROC curve",
    "calibration_error": "expected calibration error",
    "hamming_loss": "Hamming loss",
    "precision": "macro precision",
    "recall": "macro recall",
    "f1": "macro F1",
}
MAX_NAMED = 10
MAX_SHOWN = 20
MAX_NAME_LENGTH = drawn.MAX_NAME_LENGTH


@dataclasses.dataclass(frozen=True)
class MultiLabelScores(Scores):
    """The metrics of multi-label predictions.

    Attributes:
      figures: see `multi_label_scores.score`.
      classes: the metrics of each class.
      decisions: the thresholds; None if there were no validation photos to choose them on.
    """

    headline = "average_precision"

    classes: tuple[LabelFigures, ...]
    decisions: Thresholds | None

    def title(self, name: str) -> str:
        plain_name = name.removesuffix("_at_thresholds")
        title = TITLES.get(plain_name, plain_name).replace("_", " ").replace(" f1", " F1")
        return f"{title} at thresholds" if name != plain_name else title

    def class_table(self) -> list[str]:
        lines = [
            f"{'class':<15}{'photos':>6}  {'average precision':<19}{'ROC':<6}{'thresh.':<8}"
            f"{'precision':<11}{'recall':<8}F1"
        ]
        for one in self.classes:
            area, precision, recall, f1 = (
                "-" if figure is None else f"{figure.value:.2f}"
                for figure in (one.roc_auc, one.precision, one.recall, one.f1)
            )
            lines.append(
                f"{one.name[:14]:<15}{one.photos:>6}  {short_text(one.average_precision):<19}"
                f"{area:<6}{one.threshold:<8.2f}{precision:<11}{recall:<8}{f1}"
            )
        areas = [one.average_precision for one in self.classes]
        worst = [area.value if area else math.inf for area in areas]
        return [*limited(lines, worst, "average precision"), *self._note()]

    def _note(self) -> list[str]:
        missing = [one.name for one in self.classes if not one.photos]
        if not missing:
            return []
        named = ", ".join(missing[:MAX_NAMED]) + (", ..." if len(missing) > MAX_NAMED else "")
        labels = "the label" if len(missing) == 1 else f"one of these {len(missing)} labels:"
        note = f"note: no photo has {labels} {named}; macro averages leave out such labels"
        return textwrap.wrap(note, 79)


class MultiLabel(Variant[LabelPredictions, MultiLabelScores]):
    """Evaluates any number of labels per photo."""

    built_in_figures = frozenset(
        {"average_precision", "exact_match", "label_accuracy", "cross_entropy"}
    )

    def is_built_in(self, figure: str) -> bool:
        metric, _, name = figure.partition("/")
        return metric in self.built_in_figures and (not name or name in self.class_names)

    def check_labels(self, labels: np.ndarray) -> None:
        check_label_vectors(labels, self.class_names)

    def predictions(
        self, names: tuple[str, ...], labels: np.ndarray, logits: np.ndarray
    ) -> LabelPredictions:
        return LabelPredictions(names, label_vectors(labels, len(self.class_names)), logits)

    def decide(self, validation: LabelPredictions) -> Thresholds:
        """Returns the threshold of each class with the highest F1; see `fit_threshold`."""
        columns = zip(validation.labels.T, validation.probabilities.T, strict=True)
        fitted = (fit_threshold(positive, column) for positive, column in columns)
        return Thresholds(dict(zip(self.class_names, fitted, strict=True)))

    def keep(self, decisions: Thresholds, classifier: Classifier) -> None:
        write_thresholds(classifier, decisions)

    def score(
        self, predictions: LabelPredictions, decisions: Thresholds | None, resamples: int
    ) -> MultiLabelScores:
        figures, classes = score(predictions, self.class_names, decisions, resamples)
        return MultiLabelScores(figures, classes, decisions)

    def differences(
        self, one: LabelPredictions, other: LabelPredictions, rows: Resamples
    ) -> dict[str, tuple[float, Sequence[float]]]:
        drawn_rows = [np.arange(len(one)), *rows]
        means = [
            mean_of_known(areas_of_classes(said.labels, said.logits, drawn_rows)[1], axis=0)
            for said in (one, other)
        ]
        value, *resampled = (means[0] - means[1]).tolist()
        losses = one.losses() - other.losses()
        found: dict[str, tuple[float, Sequence[float]]] = {}
        if not np.isnan(value):
            found["mAP"] = (value, resampled)
        found["loss"] = (float(losses.mean()), [losses[drawn].mean() for drawn in rows])
        return found

    def csv(self, predictions: LabelPredictions, decisions: Thresholds | None) -> str:
        """Returns CSV with one line per photo: file, labels, predicted labels, and numbers.

        Labels are joined by `;`. There is one probability and one logit per class.
        """
        predicted = predictions.predicted(self._thresholds(decisions))
        labels = [
            (joined(self._names(own)), joined(self._names(said)))
            for own, said in zip(predictions.labels, predicted, strict=True)
        ]
        kinds = ("probability", "logit")
        columns = [f"{kind} {name}" for kind in kinds for name in self.class_names]
        values = [*predictions.probabilities.T, *predictions.logits.T]
        return csv_of(predictions.names, labels, columns, values)

    def plots(self, predictions: LabelPredictions, scores: MultiLabelScores) -> dict[str, Plot]:
        labels, probabilities = predictions.labels.ravel(), predictions.probabilities.ravel()
        plots = {
            "classes": class_bars(scores.classes, scores.decisions is not None),
            "reliability": drawn.reliability(
                [drawn.Calibrated("all classes", probabilities, labels)],
                0.0,
                "probability of a label",
                "share of photos that have the label",
                "labels",
            ),
        }
        if curves := self.curves(predictions):
            classes = self._with_curves(predictions).sum()
            pooled = drawn.Curve("all classes (micro)", labels, probabilities)
            plots["roc_curve"] = drawn.roc_curves(curves, classes, pooled)
            plots["precision_recall_curve"] = drawn.precision_recall_curves(curves, classes, pooled)
        return plots

    def curves(self, predictions: LabelPredictions) -> list[drawn.Curve]:
        """Returns the curve data of the ten classes with the lowest average precision."""
        labels, probabilities = predictions.labels, predictions.probabilities
        everything = [np.arange(len(predictions))]
        precisions = areas_of_classes(labels, predictions.logits, everything)[1, :, 0]
        classes = np.flatnonzero(self._with_curves(predictions))
        worst = classes[np.argsort(precisions[classes], kind="stable")][: drawn.MAX_CURVES]
        return [drawn.Curve(self.class_names[k], labels[:, k], probabilities[:, k]) for k in worst]

    def shown(self, predictions: LabelPredictions, decisions: Thresholds | None) -> Shown:
        """Returns the photos with the largest losses, and the class that contributes most."""
        predicted = predictions.predicted(self._thresholds(decisions))
        wrong = np.flatnonzero((predicted != predictions.labels).any(axis=1))
        losses = predictions.losses()
        rows = wrong[np.argsort(-losses[wrong], kind="stable")][:MAX_SHOWN]
        is_wrong = (predicted != predictions.labels)[rows]
        classes = np.where(is_wrong, predictions.class_losses()[rows], -1.0).argmax(axis=1)
        titles = []
        for row, worst in zip(rows, classes, strict=True):
            own, said = (
                shortened(names, MAX_NAME_LENGTH - 7) if names else "no label"
                for names in (self._names(one[row]) for one in (predictions.labels, predicted))
            )
            kind = "missed" if predictions.labels[row, worst] else "wrong"
            worst_name = plain(self.class_names[worst], MAX_NAME_LENGTH - 14)
            titles.append(
                f"{plain(predictions.names[row], MAX_NAME_LENGTH)}\n"
                f"true: {own}\n"
                f"predicted: {said}\n"
                f"{kind}: {worst_name} {predictions.probabilities[row, worst]:.3f}"
            )
        return Shown("mistakes", rows, titles, classes)

    def _thresholds(self, decisions: Thresholds | None) -> np.ndarray:
        return (decisions or default_thresholds(self.class_names)).of(self.class_names)

    def _names(self, chosen: np.ndarray) -> list[str]:
        """Returns the class names of a bool array (classes,)."""
        return [self.class_names[k] for k in np.flatnonzero(chosen)]

    @staticmethod
    def _with_curves(predictions: LabelPredictions) -> np.ndarray:
        """Returns which classes have photos with and without the label, bool (classes,)."""
        photos = predictions.labels.sum(axis=0)
        return (photos > 0) & (photos < len(predictions))
