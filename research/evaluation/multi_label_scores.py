"""Metrics of multi-label predictions, per class and averaged, each with a 95 % interval.

Macro averages are means over the classes that at least one photo has. Micro averages are over all
pairs of a photo and a class. Proportions have Wilson intervals, the others bootstrap intervals over
resamples of the photos; see `scores.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import special

from research.evaluation.ranking import areas_of_classes, mean_of_known, pooled_areas, totals
from research.evaluation.scores import (
    BINS,
    Figure,
    Resamples,
    bootstrap_interval,
    wilson_interval,
)
from research.evaluation.thresholds import DEFAULT, Thresholds


@dataclasses.dataclass(frozen=True)
class LabelPredictions:
    """The predictions of a model for some photos that may have several labels.

    Attributes:
      names: names of the photos.
      labels: bool (photos, classes), whether a photo has a label.
      logits: float (photos, classes).
    """

    names: tuple[str, ...]
    labels: np.ndarray
    logits: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def probabilities(self) -> np.ndarray:
        """Float64 (photos, classes), each in [0, 1]."""
        return special.expit(self.logits.astype(np.float64))

    def class_losses(self) -> np.ndarray:
        """Returns float64 (photos, classes), the binary cross-entropies in nats."""
        logits = self.logits.astype(np.float64)
        return -special.log_expit(np.where(self.labels, logits, -logits))

    def losses(self) -> np.ndarray:
        """Returns float64 (photos,), the mean binary cross-entropy over the classes."""
        return self.class_losses().mean(axis=1)

    def predicted(self, thresholds: np.ndarray | float = DEFAULT) -> np.ndarray:
        """Returns bool (photos, classes), whether a probability is at least its threshold."""
        return self.probabilities >= thresholds


@dataclasses.dataclass(frozen=True)
class LabelFigures:
    """The metrics of one label. A metric without a value is None.

    Attributes:
      name: name of the class.
      photos: number of photos that have the label. Without any, only the loss has a value.
      threshold: the label is predicted if its probability is at least this.
      loss: mean binary cross-entropy in nats.
      average_precision: area under the precision-recall curve.
      roc_auc: area under the ROC curve; None also if all photos have the label.
      precision: share of the photos with the predicted label that have it; 0 if it is never
        predicted.
      recall: share of the photos with the label for which it is predicted.
      f1: harmonic mean of precision and recall.
    """

    name: str
    photos: int
    threshold: float
    loss: Figure
    average_precision: Figure | None
    roc_auc: Figure | None
    precision: Figure | None
    recall: Figure | None
    f1: Figure | None


@dataclasses.dataclass(frozen=True)
class _Counts:
    """Numbers of photos with a predicted label, by resample and class; the first row is all photos.

    Attributes:
      hits: float64 (1 + resamples, classes), photos with the label for which it is predicted.
      predicted: photos for which the label is predicted.
      positive: photos with the label.
    """

    hits: np.ndarray
    predicted: np.ndarray
    positive: np.ndarray

    @property
    def pooled(self) -> _Counts:
        """The counts over all classes, as one class."""
        return _Counts(
            *(one.sum(axis=1, keepdims=True) for one in (self.hits, self.predicted, self.positive))
        )

    def ratios(self) -> dict[str, np.ndarray]:
        """Returns precision, recall and F1 by name; NaN where no photo has the label."""
        known = self.positive > 0
        pairs = {
            "precision": (self.hits, self.predicted),
            "recall": (self.hits, self.positive),
            "f1": (2 * self.hits, self.predicted + self.positive),
        }
        return {
            name: np.where(known, upper / np.maximum(lower, 1), np.nan)
            for name, (upper, lower) in pairs.items()
        }


def score(
    predictions: LabelPredictions,
    class_names: Sequence[str],
    thresholds: Thresholds | None,
    resamples: int,
) -> tuple[dict[str, Figure], tuple[LabelFigures, ...]]:
    """Returns the metrics over all photos by name, and those of each class.

    Args:
      predictions: for all photos.
      class_names: by label.
      thresholds: chosen on other photos; None uses 0.5.
      resamples: number of bootstrap resamples.

    Returns:
      The first are `loss` in nats; `average_precision` and `roc_auc` (macro averages) and their
      micro averages `micro_...`; `calibration_error` over all pairs of a photo and a class; and, at
      a probability of 0.5, `exact_match` (share of photos whose labels are all right),
      `hamming_loss` (share of wrong pairs), and macro and micro `precision`, `recall` and `f1`.
      With `thresholds`, also the last eight as `..._at_thresholds`. Metrics without a value are
      left out.
    """
    labels, logits = predictions.labels, predictions.logits
    rows = [np.arange(len(labels)), *Resamples(len(labels), resamples)]
    roc, average = areas_of_classes(labels, logits, rows)
    micro_roc, micro_average = pooled_areas(labels, logits, rows[1:])
    losses = totals(predictions.class_losses(), rows) / len(labels)
    drawn = {
        "loss": losses.mean(axis=1),
        "average_precision": mean_of_known(average, axis=0),
        "micro_average_precision": micro_average,
        "roc_auc": mean_of_known(roc, axis=0),
        "micro_roc_auc": micro_roc,
        "calibration_error": _calibration_errors(predictions, rows[:1]),  # see `overall`
    }
    figures = _figures(drawn)
    used = _count(labels, predictions.predicted(), rows)
    figures |= _decided(labels, predictions.predicted(), used, rows, "")
    if thresholds:
        predicted = predictions.predicted(thresholds.of(class_names))
        used = _count(labels, predicted, rows)
        figures |= _decided(labels, predicted, used, rows, "_at_thresholds")
    ratios = used.ratios()
    classes = []
    for k, name in enumerate(class_names):
        hits, chosen, photos = (
            int(one[0, k]) for one in (used.hits, used.predicted, used.positive)
        )
        of_class = _figures(
            {
                "loss": losses[:, k],
                "average_precision": average[k],
                "roc_auc": roc[k],
                **{title: values[:, k] for title, values in ratios.items()},
            }
        )
        if photos:
            share = of_class["precision"].value
            of_class["precision"] = Figure(share, wilson_interval(hits, chosen))
            of_class["recall"] = Figure(hits / photos, wilson_interval(hits, photos))
        classes.append(
            LabelFigures(
                name,
                photos,
                thresholds.thresholds[name] if thresholds else DEFAULT,
                of_class["loss"],
                *(
                    of_class.get(title)
                    for title in ("average_precision", "roc_auc", "precision", "recall", "f1")
                ),
            )
        )
    return figures, tuple(classes)


def _figures(drawn: Mapping[str, np.ndarray]) -> dict[str, Figure]:
    """Returns figures from values for all photos and for each resample, without those of NaN."""
    return {
        name: Figure(float(values[0]), bootstrap_interval(name, values[0], values[1:]))
        for name, values in drawn.items()
        if not np.isnan(values[0])
    }


def _count(labels: np.ndarray, predicted: np.ndarray, rows: Sequence[np.ndarray]) -> _Counts:
    return _Counts(totals(labels & predicted, rows), totals(predicted, rows), totals(labels, rows))


def _decided(
    labels: np.ndarray,
    predicted: np.ndarray,
    counts: _Counts,
    rows: Sequence[np.ndarray],
    suffix: str,
) -> dict[str, Figure]:
    """Returns the metrics that depend on the thresholds, by name and suffix."""
    wrong = labels != predicted
    exact = ~wrong.any(axis=1)
    macro, micro = counts.ratios(), counts.pooled.ratios()
    found = {
        "exact_match": Figure(float(exact.mean()), wilson_interval(int(exact.sum()), len(exact))),
        **_figures(
            {
                "hamming_loss": totals(wrong.mean(axis=1, keepdims=True), rows)[:, 0] / len(exact),
                **{name: mean_of_known(values, axis=1) for name, values in macro.items()},
                **{f"micro_{name}": values[:, 0] for name, values in micro.items()},
            }
        ),
    }
    return {f"{name}{suffix}": figure for name, figure in found.items()}


def _calibration_errors(predictions: LabelPredictions, rows: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the expected calibration error over all pairs, by resample, float64 (resamples,).

    It is the distance between the mean probability and the share of photos with the label, in 15
    bins of the probability, averaged over pairs (Guo et al. 2017, arXiv 1706.04599).
    """
    probabilities, labels = predictions.probabilities, predictions.labels
    photos, classes = labels.shape
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    places = (bins + BINS * np.arange(photos)[:, np.newaxis]).ravel()
    gaps = np.bincount(places, (probabilities - labels).ravel(), BINS * photos)
    gaps = totals(gaps.reshape(photos, BINS), rows)
    return np.abs(gaps).sum(axis=1) / (photos * classes)
