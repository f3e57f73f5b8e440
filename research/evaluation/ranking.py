"""Areas under the ROC curve and the precision-recall curve, for hundreds of resamples of photos.

scikit-learn would sort the photos for each resample. Here, each class is sorted once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES_PER_BLOCK = 50  # limits memory: a block holds this many rows with a number per photo


def areas(labels: np.ndarray, scores: np.ndarray, resamples: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the area under the ROC curve and the average precision of each resample.

    With more than two classes, they are means over one-against-rest areas. A class without positive
    or negative photos in a resample is left out of the mean.

    Args:
      labels: int (photos,), class indices.
      scores: (photos, 1), greater for the second of two classes; or (photos, classes).
      resamples: rows of the photos of each resample.

    Returns:
      float64 (2, resamples) in [0, 1]; NaN if no class has positive and negative photos.
    """
    classes = [1] if scores.shape[1] == 1 else range(scores.shape[1])
    columns = [(labels == k, column) for k, column in zip(classes, scores.T, strict=True)]
    pairs = [(own, column) for own, column in columns if 0 < own.sum() < len(own)]
    found = np.full((2, len(resamples)), np.nan)
    for start in range(0, len(resamples) if pairs else 0, RESAMPLES_PER_BLOCK):
        block = resamples[start : start + RESAMPLES_PER_BLOCK]
        counts = np.stack([np.bincount(rows, minlength=len(labels)) for rows in block])
        of_classes = np.stack([_areas_of_class(own, column, counts) for own, column in pairs])
        known = ~np.isnan(of_classes)
        sums = np.where(known, of_classes, 0).sum(axis=0)
        numbers = known.sum(axis=0)
        means = np.divide(sums, numbers, out=np.full(sums.shape, np.nan), where=numbers > 0)
        found[:, start : start + len(block)] = means
    return found


def _areas_of_class(of_class: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns both areas of one class, (2, resamples).

    Args:
      of_class: bool (photos,), whether a photo is positive.
      scores: (photos,).
      counts: int (resamples, photos), how often each photo was drawn.
    """
    order = np.argsort(-scores, kind="stable")
    # Photos with equal scores form one point of the curve: no threshold separates them.
    last = np.flatnonzero(np.diff(scores[order], append=np.inf))
    positive = np.where(of_class, counts, 0)[:, order].cumsum(axis=1)[:, last].astype(float)
    negative = np.where(of_class, 0, counts)[:, order].cumsum(axis=1)[:, last].astype(float)
    found = np.full((2, len(counts)), np.nan)
    known = (positive[:, -1] > 0) & (negative[:, -1] > 0)
    positive, negative = positive[known], negative[known]
    gained = np.diff(positive, axis=1, prepend=0)
    passed = np.diff(negative, axis=1, prepend=0)
    pairs = positive[:, -1] * negative[:, -1]
    found[0, known] = ((positive - gained / 2) * passed).sum(axis=1) / pairs
    both = positive + negative
    precision = np.divide(positive, both, out=np.zeros_like(positive), where=both > 0)
    found[1, known] = (gained * precision).sum(axis=1) / positive[:, -1]
    return found
