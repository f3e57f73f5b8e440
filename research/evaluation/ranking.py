"""Areas under the ROC curve and the precision-recall curve, for hundreds of resamples of photos.

scikit-learn would sort the photos for each resample. Here, each class is sorted once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from scipy import sparse

# A block of resamples has at most this many rows, and about this many numbers: a small block fits
# into the processor's cache, which is faster.
RESAMPLES_PER_BLOCK, NUMBERS_PER_BLOCK = 50, 2**18
POOLED_BINS = 4096
# Up to this many pairs of a photo and a class, the areas of all classes are computed again for each
# resample. That takes about 15 ns for each pair and resample.
MOST_PAIRS = 2**18


def areas(labels: np.ndarray, scores: np.ndarray, resamples: Iterable[np.ndarray]) -> np.ndarray:
    """Returns the area under the ROC curve and the average precision of each resample.

    With more than two classes, they are means over one-against-rest areas. A class without positive
    or negative photos in a resample is left out of the mean. If there are more than 2**18 pairs of
    a photo and a class, the resamples are those of `_areas_by_positives`.

    Args:
      labels: int (photos,), class indices.
      scores: (photos, 1), greater for the second of two classes; or (photos, classes).
      resamples: rows of the photos of each resample.

    Returns:
      float64 (2, 1 + resamples) in [0, 1], first those of all photos; NaN if no class has positive
      and negative photos.
    """
    if scores.size > MOST_PAIRS and scores.shape[1] > 1:
        return _areas_by_positives(labels, scores, resamples)
    classes = np.array([1]) if scores.shape[1] == 1 else np.arange(scores.shape[1])
    rows = itertools.chain([np.arange(len(labels))], resamples)
    found = areas_of_classes(labels[:, np.newaxis] == classes, scores, rows)
    return mean_of_known(np.where(np.isnan(found[0]), np.nan, found), axis=1)


def areas_of_classes(
    positive: np.ndarray, scores: np.ndarray, resamples: Iterable[np.ndarray]
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
    present = np.flatnonzero(positive.any(axis=0))
    parts = []
    for counts in _counts(resamples, photos):
        found = np.full((2, classes, len(counts)), np.nan)
        for k in present:
            found[:, k] = _areas_of_class(positive[:, k], scores[:, k], counts)
        parts.append(found)
    return np.concatenate(parts, axis=2)


def pooled_areas(
    positive: np.ndarray, scores: np.ndarray, resamples: Iterable[np.ndarray]
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
        for counts in _counts(resamples, photos)
    ]
    return np.concatenate([exact, *parts], axis=1)


def totals(values: np.ndarray, resamples: Iterable[np.ndarray]) -> np.ndarray:
    """Returns the sums of values over each resample, float64 (resamples, columns).

    Args:
      values: (photos, columns).
      resamples: rows of the photos of each resample.
    """
    values = values.astype(np.float64)
    parts = [counts @ values for counts in _counts(resamples, len(values))]
    return np.concatenate(parts)


def mean_of_known(values: np.ndarray, axis: int) -> np.ndarray:
    """Returns means over an axis without NaN; NaN if all values are NaN."""
    known = ~np.isnan(values)
    sums, numbers = np.where(known, values, 0).sum(axis=axis), known.sum(axis=axis)
    return np.divide(sums, numbers, out=np.full(sums.shape, np.nan), where=numbers > 0)


def _counts(resamples: Iterable[np.ndarray], photos: int) -> Iterator[np.ndarray]:
    """Yields how often each photo was drawn, in blocks of resamples: int (block, photos)."""
    size = max(1, min(RESAMPLES_PER_BLOCK, NUMBERS_PER_BLOCK // max(photos, 1)))
    rest = iter(resamples)
    while block := list(itertools.islice(rest, size)):
        yield np.stack([np.bincount(rows, minlength=photos) for rows in block])


def _areas_of_class(of_class: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns both areas of one class, (2, resamples); see `areas_of_classes`.

    Args:
      of_class: bool (photos,), whether a photo is positive.
      scores: (photos,).
      counts: int (resamples, photos), how often each photo was drawn.
    """
    order, last = _ranked(scores)
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


def _ranked(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the order of photos from the highest score on, and the last place of each score.

    Photos with equal scores form one point of the curve: no threshold separates them.
    """
    order = np.argsort(-scores)
    return order, np.flatnonzero(np.diff(scores[order], append=np.inf))


def _areas_by_positives(
    labels: np.ndarray, scores: np.ndarray, resamples: Iterable[np.ndarray]
) -> np.ndarray:
    """Returns `areas` for more than two classes, without computing each class for each resample.

    Each photo is positive for one class and negative for all others. How often the positive photos
    of a class were drawn is taken into account exactly. The numbers of negative photos have a small
    effect, because they are many; it is linearized (Efron 1982, The jackknife, the bootstrap and
    other resampling plans, chapter 6). The time is in proportion to the number of photos, for each
    resample, instead of the number of pairs of a photo and a class. Intervals have nearly the same
    width. Those of the average precision are slightly lower: resamples repeat photos, which raises
    the average precision, and here only the repeated positive photos do.
    """
    photos = len(labels)
    positives: list[_Positives] = []
    slopes = np.zeros((2, photos))
    for k in np.unique(labels):
        of_class = labels == k
        if not of_class.all():
            positives.append(_positives_of_class(of_class, scores[:, k], slopes))
    if not positives:
        return np.full((2, 1 + sum(1 for _ in resamples)), np.nan)
    starts = np.cumsum([0, *(len(one.rows) for one in positives[:-1])])
    classes = np.repeat(np.arange(len(starts)), [len(one.rows) for one in positives])
    own_rows, last, passed, false = map(np.concatenate, zip(*positives, strict=True))
    last += starts[classes]
    slopes /= len(positives)
    slopes -= slopes.mean(axis=1, keepdims=True)

    def means(counts: np.ndarray) -> np.ndarray:
        drawn = counts[own_rows].astype(np.float64)
        totals = np.add.reduceat(drawn, starts)
        true = drawn.cumsum()[last] - (totals.cumsum() - totals)[classes]
        precision = np.divide(true, true + false, out=np.zeros_like(true), where=true > 0)
        sums = np.add.reduceat(drawn * np.stack([passed, precision]), starts, axis=1)
        return (sums[:, totals > 0] / totals[totals > 0]).mean(axis=1) + slopes @ counts

    drawn = (np.bincount(rows, minlength=photos) for rows in resamples)
    return np.stack([means(counts) for counts in (np.ones(photos, int), *drawn)], axis=1).clip(0, 1)


class _Positives(NamedTuple):
    """The positive photos of a class, from the highest score on.

    Attributes:
      rows: int (positives,), their rows.
      last: int (positives,), the last place with the same score.
      passed: float64 (positives,), the share of negative photos with a lower score; half of those
        with the same score count.
      false: int (positives,), the number of negative photos with the same or a higher score.
    """

    rows: np.ndarray
    last: np.ndarray
    passed: np.ndarray
    false: np.ndarray


def _positives_of_class(of_class: np.ndarray, scores: np.ndarray, slopes: np.ndarray) -> _Positives:
    """Returns the positive photos of a class, and adds to the slopes of the negative ones.

    Args:
      of_class: bool (photos,), whether a photo is positive; some are and some are not.
      scores: (photos,).
      slopes: float64 (2, photos), the derivatives of both areas with respect to the number of times
        that a photo was drawn, if the numbers of positive photos stay the same.
    """
    order, last = _ranked(scores)
    positive = of_class[order]
    point = np.repeat(np.arange(len(last)), np.diff(last, prepend=-1))  # of the curve
    true, false = (np.cumsum(one)[last] for one in (positive, ~positive))
    gained, passed = np.diff(true, prepend=0), np.diff(false, prepend=0)
    above = (true - gained / 2) / true[-1]  # share of positive photos
    below = (false[-1] - false + passed / 2) / false[-1]  # share of negative photos
    roc = float((gained * below).sum() / true[-1])
    both = true + false
    lost = (gained * true / both**2 / true[-1])[::-1].cumsum()[::-1]
    negative = ~positive
    slopes[0, order[negative]] += (above[point[negative]] - roc) / false[-1]
    slopes[1, order[negative]] -= lost[point[negative]]
    places = point[positive]
    return _Positives(order[positive], true[places] - 1, below[places], false[places])
