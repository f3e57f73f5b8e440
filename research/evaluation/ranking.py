"""Areas under the ROC curve and the precision-recall curve, for hundreds of resamples of photos.

scikit-learn would sort the photos for each resample. Here, each class is sorted once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from scipy import sparse

# A block of resamples has at most this many rows, and about this many numbers: a small block fits
# into the processor's cache, which is faster.
RESAMPLES_PER_BLOCK, NUMBERS_PER_BLOCK = 50, 2**18
POOLED_BINS = 4096


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
    classes = np.array([1]) if scores.shape[1] == 1 else np.arange(scores.shape[1])
    found = areas_of_classes(labels[:, np.newaxis] == classes, scores, resamples)
    return mean_of_known(np.where(np.isnan(found[0]), np.nan, found), axis=1)


def areas_of_classes(
    positive: np.ndarray, scores: np.ndarray, resamples: Sequence[np.ndarray]
) -> np.ndarray:
    """Returns the area under the ROC curve and the average precision of each class and resample.

    Args:
      positive: bool (photos, classes), whether a photo has a label.
      scores: (photos, classes), greater for photos that are more likely to have the label.
      resamples: rows of the photos of each resample.

    Returns:
      float64 (2, classes, resamples) in [0, 1]. Both are NaN in a resample without positive photos,
      and the area under the ROC curve also in one without negative photos.
    """
    photos, classes = positive.shape
    found = np.full((2, classes, len(resamples)), np.nan)
    for part, counts in _counts(resamples, photos):
        for k in np.flatnonzero(positive.any(axis=0)):
            found[:, k, part] = _areas_of_class(positive[:, k], scores[:, k], counts)
    return found


def pooled_areas(
    positive: np.ndarray, scores: np.ndarray, resamples: Sequence[np.ndarray]
) -> np.ndarray:
    """Returns both areas over all pairs of a photo and a class (micro averages).

    Args:
      positive: see `areas_of_classes`.
      scores: see `areas_of_classes`; must be comparable between classes.
      resamples: rows of the photos of each resample. For these, scores are rounded to 4,096 of
        their quantiles, which saves most of the time and changes an area by about 1 / 4,096.

    Returns:
      float64 (2, 1 + resamples), first the exact areas of all pairs; NaN as in `areas_of_classes`.
    """
    photos, pairs = len(positive), positive.size
    columns = positive.reshape(-1, 1), scores.reshape(-1, 1)
    exact = areas_of_classes(*columns, [np.arange(pairs)])[:, 0]
    edges = np.quantile(scores, np.linspace(0, 1, POOLED_BINS + 1)[1:-1])
    places = POOLED_BINS - 1 - np.searchsorted(edges, scores, side="right").ravel()
    rows = np.arange(pairs) // positive.shape[1]
    own = positive.ravel()
    histograms = [
        sparse.csr_array((chosen.astype(np.float64), (rows, places)), (photos, POOLED_BINS))
        for chosen in (own, ~own)
    ]
    parts = [
        _areas(*((counts @ histogram).cumsum(axis=1) for histogram in histograms))
        for _, counts in _counts(resamples, photos)
    ]
    return np.concatenate([exact, *parts], axis=1)


def totals(values: np.ndarray, resamples: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the sums of values over each resample, float64 (resamples, columns).

    Args:
      values: (photos, columns).
      resamples: rows of the photos of each resample.
    """
    values = values.astype(np.float64)
    parts = [counts @ values for _, counts in _counts(resamples, len(values))]
    return np.concatenate(parts)


def mean_of_known(values: np.ndarray, axis: int) -> np.ndarray:
    """Returns means over an axis without NaN; NaN if all values are NaN."""
    known = ~np.isnan(values)
    sums, numbers = np.where(known, values, 0).sum(axis=axis), known.sum(axis=axis)
    return np.divide(sums, numbers, out=np.full(sums.shape, np.nan), where=numbers > 0)


def _counts(resamples: Sequence[np.ndarray], photos: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields blocks of resamples, and how often each photo was drawn: (block, photos)."""
    size = max(1, min(RESAMPLES_PER_BLOCK, NUMBERS_PER_BLOCK // max(photos, 1)))
    for start in range(0, len(resamples), size):
        block = resamples[start : start + size]
        counts = np.stack([np.bincount(rows, minlength=photos) for rows in block])
        yield slice(start, start + len(block)), counts


def _areas_of_class(of_class: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns both areas of one class, (2, resamples); see `areas_of_classes`.

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
    return _areas(positive, negative)


def _areas(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Returns both areas of curves, (2, resamples); see `areas_of_classes`.

    Args:
      positive: float64 (resamples, points), number of positive photos from the highest score to
        each point.
      negative: number of negative photos.
    """
    found = np.full((2, len(positive)), np.nan)
    known = positive[:, -1] > 0
    positive, negative = positive[known], negative[known]
    gained = np.diff(positive, axis=1, prepend=0)
    passed = np.diff(negative, axis=1, prepend=0)
    pairs = positive[:, -1] * negative[:, -1]
    ranked = ((positive - gained / 2) * passed).sum(axis=1)
    found[0, known] = np.divide(ranked, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
    both = positive + negative
    precision = np.divide(positive, both, out=np.zeros_like(positive), where=both > 0)
    found[1, known] = (gained * precision).sum(axis=1) / positive[:, -1]
    return found
