"""Metrics of predictions, each with a 95 % interval.

Proportions of photos have Wilson intervals. The other metrics have percentile intervals over
bootstrap resamples of the photos (Efron 1979).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import special, stats
from sklearn import metrics

from research.evaluation.ranking import areas

ConfidenceInterval = tuple[float, float]

BINS = 15  # of confidence


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The predictions of a model for some photos.

    Attributes:
      names: names of the photos.
      labels: int (photos,), class indices.
      logits: float (photos, classes), or (photos, 1) for the second of two classes.
    """

    names: tuple[str, ...]
    labels: np.ndarray
    logits: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def log_probabilities(self, temperature: float = 1.0) -> np.ndarray:
        """Returns float64 (photos, classes), for the logits divided by a temperature."""
        scaled = self.logits.astype(np.float64) / temperature
        if scaled.shape[1] == 1:
            return special.log_expit(np.concatenate([-scaled, scaled], axis=1))
        return special.log_softmax(scaled, axis=1)

    @property
    def probabilities(self) -> np.ndarray:
        """Float64 (photos, classes), each row sums to 1."""
        return np.exp(self.log_probabilities())

    @property
    def predicted(self) -> np.ndarray:
        """Int (photos,), the most probable class; the first one if several are equal."""
        return self.log_probabilities().argmax(axis=1)

    @property
    def confidence(self) -> np.ndarray:
        """Float64 (photos,), the probability of the predicted class."""
        return self.probabilities.max(axis=1)

    @property
    def correct(self) -> np.ndarray:
        """Bool (photos,), whether the predicted class is the label."""
        return self.predicted == self.labels

    def losses(self, temperature: float = 1.0) -> np.ndarray:
        """Returns float64 (photos,), the cross-entropy of each photo in nats."""
        return -self.log_probabilities(temperature)[np.arange(len(self)), self.labels]


@dataclasses.dataclass(frozen=True)
class Figure:
    """The value of a metric and its 95 % interval; None if there is no interval."""

    value: float
    interval: ConfidenceInterval | None


@dataclasses.dataclass(frozen=True)
class ClassFigures:
    """The metrics of one class.

    Attributes:
      name: name of the class.
      photos: number of photos of the class.
      precision: share of the photos predicted as the class that belong to it; None without photos.
      recall: share of the photos of the class that are predicted as it; None without photos.
      f1: harmonic mean of precision and recall; None without photos.
    """

    name: str
    photos: int
    precision: Figure | None
    recall: Figure | None
    f1: Figure | None


@dataclasses.dataclass(frozen=True)
class Decisions:
    """Values that are fitted on the validation photos.

    Attributes:
      temperature: divisor of the logits (Guo et al. 2017, arXiv 1706.04599).
      threshold: the second class is predicted if its probability is at least this; None with more
        than two classes.
    """

    temperature: float
    threshold: float | None


def overall(
    predictions: Predictions, decisions: Decisions | None = None, *, resamples: int
) -> dict[str, Figure]:
    """Returns the metrics over all photos by name, without those that are undefined for them.

    They are `loss` in nats, `accuracy`, `roc_auc` and `average_precision` (with more than two
    classes, the one-against-rest mean over classes), and `calibration_error` (15 confidence bins of
    equal width). With `decisions`, also `loss_at_temperature` and `accuracy_at_threshold`.
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
    for name, share in shares.items():
        found[name] = Figure(float(share.mean()), wilson_interval(int(share.sum()), len(share)))
    labels, scores = predictions.labels, predictions.logits
    if scores.shape[1] > 1:  # logits of one class are not comparable between photos
        scores = predictions.probabilities
    both = areas(labels, scores, [np.arange(len(labels)), *resampled])
    for name, (area, *drawn) in zip(("roc_auc", "average_precision"), both, strict=True):
        if not math.isnan(area):
            found[name] = Figure(float(area), percentiles(drawn))
    confidence, correct = predictions.confidence, predictions.correct
    drawn = [calibration_error(confidence[rows], correct[rows]) for rows in resampled]
    found["calibration_error"] = Figure(calibration_error(confidence, correct), percentiles(drawn))
    return found


def of_classes(
    predictions: Predictions, class_names: tuple[str, ...], resamples: int
) -> tuple[ClassFigures, ...]:
    """Returns the metrics of each class. They are None for a class without photos.

    The Wilson interval of precision is over the photos predicted as the class, that of recall over
    the photos of the class.
    """
    labels, predicted = predictions.labels, predictions.predicted
    classes = np.arange(len(class_names))
    counts = confusion(labels, predicted, len(classes))
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        labels, predicted, labels=classes, zero_division=0.0
    )
    drawn = np.array(
        [
            _f1(confusion(labels[rows], predicted[rows], len(classes)))
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
        if counts[k].sum()
        else ClassFigures(name, 0, None, None, None)
        for k, name in enumerate(class_names)
    )


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Returns numbers of photos by true class (row) and predicted class (column).

    `sklearn.metrics.confusion_matrix` gives the same, but is too slow for hundreds of resamples.

    Args:
      labels: int (photos,).
      predicted: int (photos,).
      classes: number of classes.

    Returns:
      int (classes, classes).
    """
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, -1)


def _f1(counts: np.ndarray) -> np.ndarray:
    hits = np.diag(counts)
    both = counts.sum(axis=0) + counts.sum(axis=1)
    return np.divide(2 * hits, both, out=np.zeros(len(counts)), where=both > 0)


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Returns the expected calibration error (Guo et al. 2017, arXiv 1706.04599), 0 to 1.

    It is the distance between confidence and accuracy in a bin, averaged over photos.

    Args:
      confidence: float (photos,), the probability of the predicted class.
      correct: bool (photos,), whether the predicted class is the label.
    """
    table = calibration_table(confidence, correct)
    return float(np.average(np.abs(table.accuracy - table.confidence), weights=table.photos))


@dataclasses.dataclass(frozen=True)
class CalibrationTable:
    """Photos in bins of confidence; bins without photos are left out.

    Attributes:
      confidence: float64 (bins,), mean confidence.
      accuracy: float64 (bins,), share of correct predictions.
      photos: int (bins,), number of photos.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    photos: np.ndarray


def calibration_table(confidence: np.ndarray, correct: np.ndarray) -> CalibrationTable:
    """Sorts photos into 15 confidence bins of equal width between 0 and 1."""
    index = np.minimum((confidence * BINS).astype(int), BINS - 1)
    photos = np.bincount(index, minlength=BINS)
    kept = photos > 0
    return CalibrationTable(
        np.bincount(index, confidence, BINS)[kept] / photos[kept],
        np.bincount(index, correct, BINS)[kept] / photos[kept],
        photos[kept],
    )


def resampled_rows(count: int, resamples: int) -> list[np.ndarray]:
    """Returns rows drawn with replacement. They are the same in each call, for paired comparisons.

    Args:
      count: number of rows to draw from, and number of rows in each resample.
      resamples: number of resamples.
    """
    generator = np.random.default_rng(0)
    return [generator.integers(count, size=count) for _ in range(resamples)]


def percentiles(drawn: Sequence[float] | np.ndarray) -> ConfidenceInterval | None:
    """Returns the 2.5th and 97.5th percentile without NaN values; None if no value is left."""
    finite = [value for value in drawn if not math.isnan(value)]
    if not finite:
        return None
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)


def wilson_interval(successes: float, trials: float) -> ConfidenceInterval | None:
    """Returns the 95 % Wilson score interval of a proportion (Wilson 1927); None if no trials."""
    if not trials:
        return None
    interval = stats.binomtest(round(successes), round(trials)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)
