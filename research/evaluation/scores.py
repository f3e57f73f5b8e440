"""How good predictions are: figures of a set of photos, each with a 95 % interval.

What scikit-learn and SciPy compute, they compute. Intervals of shares of photos are Wilson's;
the others are percentiles over resamples of the photos (bootstrap, Efron 1979).
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy import special
from sklearn import metrics

from research.evaluation.intervals import Interval, percentiles, resampled_rows, wilson_interval
from research.evaluation.ranking import areas, resampled_areas

RESAMPLES = 500
CALIBRATION_BINS = 15


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a model says of some photos.

    Attributes:
      names: of the photos.
      labels: int (photos,), class indices.
      logits: float (photos, 1), those of the second class, or (photos, classes).
    """

    names: tuple[str, ...]
    labels: np.ndarray
    logits: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def log_probabilities(self, temperature: float = 1.0) -> np.ndarray:
        """Returns float64 (photos, classes), of logits divided by a temperature."""
        scaled = self.logits.astype(np.float64) / temperature
        if scaled.shape[1] == 1:
            return special.log_expit(np.concatenate([-scaled, scaled], axis=1))
        return special.log_softmax(scaled, axis=1)

    @property
    def probabilities(self) -> np.ndarray:
        """Float64 (photos, classes)."""
        return np.exp(self.log_probabilities())

    @property
    def predicted(self) -> np.ndarray:
        """Int (photos,), the most probable class; the first of two that are equally probable."""
        return self.log_probabilities().argmax(axis=1)

    @property
    def confidence(self) -> np.ndarray:
        """Float64 (photos,), the probability of the predicted class."""
        return self.probabilities.max(axis=1)

    @property
    def correct(self) -> np.ndarray:
        """Bool (photos,), whether the predicted class is the photo's."""
        return self.predicted == self.labels

    def losses(self, temperature: float = 1.0) -> np.ndarray:
        """Returns float64 (photos,), the cross-entropy in nats of each photo."""
        rows = np.arange(len(self))
        return -self.log_probabilities(temperature)[rows, self.labels]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure and its 95 % interval; None where the photos do not say it."""

    value: float
    interval: Interval | None


@dataclasses.dataclass(frozen=True)
class ClassFigures:
    """How well one class is told from the others.

    Attributes:
      name: of the class.
      photos: how many are of it.
      precision: the share of photos predicted as it that are.
      recall: the share of its photos that are predicted as it.
      f1: harmonic mean of both.
    """

    name: str
    photos: int
    precision: Figure
    recall: Figure
    f1: Figure


@dataclasses.dataclass(frozen=True)
class Decisions:
    """What was chosen on other photos, those of validation.

    Attributes:
      temperature: that logits are divided by (Guo et al. 2017, arXiv 1706.04599).
      threshold: the probability from which on the second class is predicted; None where there are
        more than two classes.
    """

    temperature: float
    threshold: float | None


def overall(
    predictions: Predictions, decisions: Decisions | None = None, resamples: int = RESAMPLES
) -> dict[str, Figure]:
    """Returns the figures of a whole set, by name; those that it does not say are left out.

    `loss` in nats, `accuracy`, `roc_auc` and `average_precision` (of more than two classes, the
    mean over each against the rest), `calibration_error` (15 bins of confidence, of equal width);
    with decisions, `loss_at_temperature` and `accuracy_at_threshold`.
    """
    shares = {"accuracy": predictions.correct}
    losses = {"loss": predictions.losses()}
    if decisions:
        losses["loss_at_temperature"] = predictions.losses(decisions.temperature)
        if decisions.threshold is not None:
            above = predictions.probabilities[:, 1] >= decisions.threshold
            shares["accuracy_at_threshold"] = above == predictions.labels
    resampled = resampled_rows(len(predictions), resamples)
    found = {}
    for name, values in losses.items():
        drawn = [float(values[rows].mean()) for rows in resampled]
        found[name] = Figure(float(values.mean()), percentiles(drawn))
    confidence, correct = predictions.confidence, predictions.correct
    drawn = [calibration_error(confidence[rows], correct[rows]) for rows in resampled]
    error = calibration_error(confidence, correct)
    found["calibration_error"] = Figure(error, percentiles(drawn))
    labels, scores = predictions.labels, predictions.logits
    if scores.shape[1] > 1:  # the logit of a class alone does not order photos
        scores = predictions.probabilities
    names = ("roc_auc", "average_precision")
    of_resamples = resampled_areas(labels, scores, resampled)
    for name, value, drawn in zip(names, areas(labels, scores), of_resamples, strict=True):
        if not math.isnan(value):
            found[name] = Figure(value, percentiles(drawn))
    for name, share in shares.items():
        found[name] = Figure(float(share.mean()), wilson_interval(int(share.sum()), len(share)))
    return found


def of_classes(
    predictions: Predictions, class_names: tuple[str, ...], resamples: int = RESAMPLES
) -> tuple[ClassFigures, ...]:
    """Returns the figures of each class; those of a class without photos are 0, as scikit-learn's.

    Precision's interval is Wilson's over the photos predicted as the class, recall's over its own.
    """
    counts = confusion(predictions, len(class_names))
    labels, predicted = predictions.labels, predictions.predicted
    classes = np.arange(len(class_names))
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        labels, predicted, labels=classes, zero_division=0.0
    )
    drawn = np.array(
        [
            _f1(confusion_counts(labels[rows], predicted[rows], len(classes)))
            for rows in resampled_rows(len(predictions), resamples)
        ]
    ).reshape(-1, len(classes))
    hits = [int(count) for count in np.diag(counts)]
    return tuple(
        ClassFigures(
            name,
            int(counts[k].sum()),
            Figure(float(precision[k]), wilson_interval(hits[k], int(counts[:, k].sum()))),
            Figure(float(recall[k]), wilson_interval(hits[k], int(counts[k].sum()))),
            Figure(float(f1[k]), percentiles(list(drawn[:, k]))),
        )
        for k, name in enumerate(class_names)
    )


def confusion(predictions: Predictions, classes: int) -> np.ndarray:
    """Returns int (classes, classes): how many of the row are predicted as the column."""
    return confusion_counts(predictions.labels, predictions.predicted, classes)


def confusion_counts(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Returns what `sklearn.metrics.confusion_matrix` does, which takes too long to resample."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, -1)


def _f1(counts: np.ndarray) -> np.ndarray:
    hits = np.diag(counts)
    both = counts.sum(axis=0) + counts.sum(axis=1)
    return np.divide(2 * hits, both, out=np.zeros(len(counts)), where=both > 0)


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Returns the expected calibration error (Guo et al. 2017, arXiv 1706.04599), 0 to 1.

    That is how far confidence is from accuracy within a bin, in the mean over photos.

    Args:
      confidence: (photos,), the probability of the predicted class.
      correct: bool (photos,), whether it is the photo's class.
    """
    table = calibration_table(confidence, correct)
    return float(
        np.sum(table.photos * np.abs(table.accuracy - table.confidence)) / table.photos.sum()
    )


@dataclasses.dataclass(frozen=True)
class CalibrationTable:
    """Photos by how confident a model is of them; float64 (bins,), of bins that hold photos."""

    confidence: np.ndarray
    accuracy: np.ndarray
    photos: np.ndarray


def calibration_table(
    confidence: np.ndarray, correct: np.ndarray, bins: int = CALIBRATION_BINS
) -> CalibrationTable:
    """Sorts photos into bins of confidence, equally wide between 0 and 1."""
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    photos = np.bincount(place, minlength=bins)
    kept = photos > 0
    return CalibrationTable(
        np.bincount(place, confidence, bins)[kept] / photos[kept],
        np.bincount(place, correct, bins)[kept] / photos[kept],
        photos[kept],
    )
