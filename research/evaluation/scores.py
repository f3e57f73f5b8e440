"""Metrics of predictions, each with a 95 % interval.

Proportions of photos have Wilson intervals. The other metrics have percentile intervals over
bootstrap resamples of the photos (Efron 1979).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy import special

from research.evaluation.ranking import areas

ConfidenceInterval = tuple[float, float]

BINS = 15  # of confidence
NUMBERS_PER_BLOCK = 2**14  # of log-probabilities, which then fit into the cache of the processor
NORMAL_QUANTILE = 1.959963984540054  # of 0.975


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
        return _log_probabilities(self.logits, temperature)

    def reduced(
        self, reduce: Callable[[np.ndarray, np.ndarray], np.ndarray], temperature: float = 1.0
    ) -> np.ndarray:
        """Returns a function of the log-probabilities, computed for blocks of photos.

        The log-probabilities of all photos take several times the memory of the logits.

        Args:
          reduce: from the log-probabilities (block, classes) and the labels (block,) to an array
            (block, ...).
          temperature: divisor of the logits.
        """
        size = max(1, NUMBERS_PER_BLOCK // self.logits.shape[1])
        blocks = [slice(start, start + size) for start in range(0, max(len(self), 1), size)]
        return np.concatenate(
            [
                reduce(_log_probabilities(self.logits[block], temperature), self.labels[block])
                for block in blocks
            ]
        )

    @property
    def classes(self) -> int:
        """The number of classes."""
        return max(self.logits.shape[1], 2)

    @property
    def probabilities(self) -> np.ndarray:
        """Float64 (photos, classes), each row sums to 1."""
        return self.reduced(lambda given, _: np.exp(given))

    @functools.cached_property
    def predicted(self) -> np.ndarray:
        """Int (photos,), the most probable class; the first one if several are equal."""
        return self.reduced(lambda given, _: given.argmax(axis=1))

    @functools.cached_property
    def confidence(self) -> np.ndarray:
        """Float64 (photos,), the probability of the predicted class."""
        return self.reduced(lambda given, _: np.exp(given.max(axis=1)))

    @property
    def correct(self) -> np.ndarray:
        """Bool (photos,), whether the predicted class is the label."""
        return self.predicted == self.labels

    def losses(self, temperature: float = 1.0) -> np.ndarray:
        """Returns float64 (photos,), the cross-entropy of each photo in nats."""
        return -self.reduced(of_label, temperature)


def _log_probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    scaled = logits.astype(np.float64) / temperature
    if scaled.shape[1] == 1:
        return special.log_expit(np.concatenate([-scaled, scaled], axis=1))
    return special.log_softmax(scaled, axis=1)


def of_label(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the values (photos,) of each photo's own class, from those of all classes."""
    return values[np.arange(len(labels)), labels]


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

    The calibration error has no interval: that of resampled photos is higher than that of the
    photos themselves, often by more than an interval would be wide.
    """
    shares = {"accuracy": predictions.correct}
    losses = {"loss": predictions.losses()}
    if decisions:
        losses["loss_at_temperature"] = predictions.losses(decisions.temperature)
        if decisions.threshold is not None:
            above = predictions.probabilities[:, 1] >= decisions.threshold
            shares["accuracy_at_threshold"] = above == predictions.labels
    resampled = Resamples(len(predictions), resamples)
    found = {}
    for name, values in losses.items():
        drawn = [float(values[rows].mean()) for rows in resampled]
        found[name] = Figure(float(values.mean()), percentiles(drawn))
    for name, share in shares.items():
        found[name] = Figure(float(share.mean()), wilson_interval(int(share.sum()), len(share)))
    labels, scores = predictions.labels, predictions.logits
    if scores.shape[1] > 1:  # logits of one class are not comparable between photos
        scores = predictions.probabilities
    both = areas(labels, scores, resampled)
    for name, (area, *drawn) in zip(("roc_auc", "average_precision"), both, strict=True):
        if not math.isnan(area):
            found[name] = Figure(float(area), bootstrap_interval(name, area, drawn))
    error = calibration_error(predictions.confidence, predictions.correct)
    found["calibration_error"] = Figure(error, None)
    return found


def of_classes(
    predictions: Predictions, class_names: tuple[str, ...], resamples: int
) -> tuple[ClassFigures, ...]:
    """Returns the metrics of each class. They are None for a class without photos.

    The Wilson interval of precision is over the photos predicted as the class, that of recall over
    the photos of the class.
    """
    labels, predicted = predictions.labels, predictions.predicted

    def count(rows: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        own, said = labels[rows], predicted[rows]
        found = (own[own == said], said, own)
        hits, chosen, photos = (np.bincount(one, minlength=len(class_names)) for one in found)
        return hits, chosen, photos

    hits, chosen, photos = count(slice(None))
    resampled = Resamples(len(predictions), resamples)
    drawn = np.stack([_f1(*count(rows)) for rows in resampled], axis=1) if resamples else None
    f1 = _f1(hits, chosen, photos)
    return tuple(
        ClassFigures(
            name,
            int(photos[k]),
            Figure(_share(hits[k], chosen[k]), wilson_interval(hits[k], chosen[k])),
            Figure(_share(hits[k], photos[k]), wilson_interval(hits[k], photos[k])),
            Figure(float(f1[k]), None if drawn is None else percentiles(drawn[k])),
        )
        if photos[k]
        else ClassFigures(name, 0, None, None, None)
        for k, name in enumerate(class_names)
    )


def confusion(labels: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pairs of a true and a predicted class that photos have, and their numbers.

    A matrix of all pairs of classes would have far more entries than there are photos.

    Args:
      labels: int (photos,).
      predicted: int (photos,).

    Returns:
      int (pairs, 2), in the order of the true class, then of the predicted class; and int (pairs,).
    """
    pairs, counts = np.unique(np.stack([labels, predicted], axis=1), axis=0, return_counts=True)
    return pairs, counts


def _share(part: int, whole: int) -> float:
    return float(part / whole) if whole else 0.0


def _f1(hits: np.ndarray, chosen: np.ndarray, photos: np.ndarray) -> np.ndarray:
    both = chosen + photos
    return np.divide(2 * hits, both, out=np.zeros(len(hits)), where=both > 0)


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


class Resamples:
    """Rows drawn with replacement. They are the same each time, for paired comparisons.

    They are drawn again in each iteration, because all of them would take kilobytes per photo.

    Args:
      count: number of rows to draw from, and number of rows in each resample.
      number: number of resamples.
    """

    def __init__(self, count: int, number: int) -> None:
        self._count, self._number = count, number

    def __len__(self) -> int:
        return self._number

    def __iter__(self) -> Iterator[np.ndarray]:
        generator = np.random.default_rng(0)
        for _ in range(self._number):
            yield generator.integers(self._count, size=self._count)


def percentiles(drawn: Sequence[float] | np.ndarray) -> ConfidenceInterval | None:
    """Returns the 2.5th and 97.5th percentile without NaN values; None if no value is left."""
    values = np.asarray(drawn, np.float64)
    finite = values[~np.isnan(values)]
    if not len(finite):
        return None
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_interval(
    name: str, value: float, drawn: Sequence[float] | np.ndarray
) -> ConfidenceInterval | None:
    """Returns the 95 % interval of a figure from its values for resampled photos.

    It is between the percentiles, except for average precision. Copies of a photo have the same
    rank, which raises the average precision of resampled photos above the value, as the value is
    above that of all possible photos. The percentiles are therefore lowered by twice the bias that
    the bootstrap estimates (Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter
    10). With few photos per class, this interval is still too high.

    Args:
      name: of the figure.
      value: for all photos.
      drawn: for resampled photos; NaN values are left out.
    """
    found = percentiles(drawn)
    if found is None or not name.endswith("average_precision"):
        return found
    shift = 2 * (np.nanmean(drawn) - value)
    low, high = (float(np.clip(bound - shift, 0, 1)) for bound in found)
    return min(low, float(value)), max(high, float(value))


def wilson_interval(successes: float, trials: float) -> ConfidenceInterval | None:
    """Returns the 95 % Wilson score interval of a proportion (Wilson 1927); None if no trials."""
    successes, trials = round(successes), round(trials)
    if not trials:
        return None
    share, squared = successes / trials, NORMAL_QUANTILE**2 / trials
    middle = (share + squared / 2) / (1 + squared)
    half = math.sqrt(squared * (share * (1 - share) + squared / 4)) / (1 + squared)
    low = middle - half if successes else 0.0
    return low, middle + half if successes < trials else 1.0
