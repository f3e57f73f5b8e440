"""How well scores put photos of a class before the others: areas under two curves.

scikit-learn computes them for the photos themselves. For the hundreds of resamples that intervals
are drawn from it sorts the photos anew each time; here each class is sorted once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from sklearn import metrics

RESAMPLES_AT_A_TIME = 50  # so many rows of as many numbers as there are photos


def areas(labels: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """Returns the areas under the ROC curve and under precision over recall (average precision).

    Args:
      labels: int (photos,), class indices.
      scores: (photos, 1), greater for the second of two classes; or (photos, classes).

    Returns:
      both 0 to 1, of more than two classes the means over each against the rest; NaN where no class
      has photos of it and others.
    """
    of_classes = [
        (metrics.roc_auc_score(own, column), metrics.average_precision_score(own, column))
        for own, column in one_against_rest(labels, scores)
    ]
    if not of_classes:
        return math.nan, math.nan
    roc, average = np.mean(of_classes, axis=0)
    return float(roc), float(average)


def one_against_rest(labels: np.ndarray, scores: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns which photos are of a class, and its scores, for each that has photos and not all."""
    classes = [1] if scores.shape[1] == 1 else range(scores.shape[1])
    pairs = [(labels == k, column) for k, column in zip(classes, scores.T, strict=True)]
    return [(own, column) for own, column in pairs if 0 < own.sum() < len(own)]


def resampled_areas(
    labels: np.ndarray, scores: np.ndarray, resamples: Sequence[np.ndarray]
) -> np.ndarray:
    """Returns `areas` of rows drawn with replacement, float64 (2, resamples).

    Where a resample has no photo of a class, the mean is over the others.
    """
    pairs = one_against_rest(labels, scores)
    found = np.full((2, len(resamples)), np.nan)
    for start in range(0, len(resamples) if pairs else 0, RESAMPLES_AT_A_TIME):
        some = resamples[start : start + RESAMPLES_AT_A_TIME]
        counts = np.stack([np.bincount(rows, minlength=len(labels)) for rows in some])
        of_classes = np.stack([_areas_of_class(own, column, counts) for own, column in pairs])
        known = ~np.isnan(of_classes)
        sums = np.where(known, of_classes, 0).sum(axis=0)
        numbers = known.sum(axis=0)
        means = np.divide(sums, numbers, out=np.full(sums.shape, np.nan), where=numbers > 0)
        found[:, start : start + len(some)] = means
    return found


def _areas_of_class(of_class: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns both areas of one class, (2, resamples), each photo counted as often as drawn."""
    order = np.argsort(-scores, kind="stable")
    # Photos of equal scores are passed together: a threshold does not tell them apart.
    last = np.flatnonzero(np.diff(scores[order], append=np.inf))
    own = np.where(of_class, counts, 0)[:, order].cumsum(axis=1)[:, last].astype(float)
    rest = np.where(of_class, 0, counts)[:, order].cumsum(axis=1)[:, last].astype(float)
    found = np.full((2, len(counts)), np.nan)
    known = (own[:, -1] > 0) & (rest[:, -1] > 0)
    own, rest = own[known], rest[known]
    gained = np.diff(own, axis=1, prepend=0)
    passed = np.diff(rest, axis=1, prepend=0)
    found[0, known] = ((own - gained / 2) * passed).sum(axis=1) / (own[:, -1] * rest[:, -1])
    both = own + rest
    precision = np.divide(own, both, out=np.zeros_like(own), where=both > 0)
    found[1, known] = (gained * precision).sum(axis=1) / own[:, -1]
    return found
