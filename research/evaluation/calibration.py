"""What is chosen on validation photos, to be used on others: a temperature and a threshold."""

from __future__ import annotations

import math

import numpy as np
from scipy import optimize

from research.evaluation.scores import Decisions, Predictions

TEMPERATURES = (1e-3, 1e3)  # where the search ends if logits say nothing at all


def decide(validation: Predictions) -> Decisions:
    """Chooses temperature and threshold on photos that were not trained on."""
    is_binary = validation.logits.shape[1] == 1
    return Decisions(fit_temperature(validation), fit_threshold(validation) if is_binary else None)


def fit_temperature(predictions: Predictions) -> float:
    """Returns what to divide logits by so that the loss is least (arXiv 1706.04599).

    Above 1 where a model is too sure. The loss is that of `smoothed_targets`: of the labels
    themselves it would be least at 0 where no photo is mistaken, and a mistake among other photos
    would then cost without bound.
    """
    targets = smoothed_targets(predictions.labels, predictions.probabilities.shape[1])

    def loss(log_temperature: float) -> float:
        log_probabilities = predictions.log_probabilities(math.exp(log_temperature))
        return -float((targets * log_probabilities).sum(axis=1).mean())

    low, high = map(math.log, TEMPERATURES)
    found = optimize.minimize_scalar(loss, bounds=(low, high), method="bounded")
    return math.exp(found.x)


def smoothed_targets(labels: np.ndarray, classes: int) -> np.ndarray:
    """Returns the probabilities that n photos let one expect (after Platt 1999, section 2.2).

    (n + 1) / (n + 2) for a photo's own class: the mean after n successes and no failure that began
    from a uniform prior. The rest is spread over the other classes. Platt counts each class by
    itself, as his curve has an offset too; a temperature is one number for all of them, and a
    failure a class would outweigh the photos where many classes have few each.

    Args:
      labels: int (photos,), class indices.
      classes: how many there are, at least 2.

    Returns:
      float64 (photos, classes), rows that add up to 1.
    """
    rest = 1 / (len(labels) + 2)
    targets = np.full((len(labels), classes), rest / (classes - 1))
    targets[np.arange(len(labels)), labels] = 1 - rest
    return targets


def fit_threshold(predictions: Predictions) -> float:
    """Returns the probability of the second class from which on predicting it is most often right.

    Among equally good ones the nearest to one half.
    """
    scores = predictions.probabilities[:, 1]
    ordered = np.unique(scores)
    between = (ordered[1:] + ordered[:-1]) / 2
    candidates = np.array([0.5, *between, ordered[0], np.nextafter(ordered[-1], 2)])
    of_second, of_first = (np.sort(scores[predictions.labels == label]) for label in (1, 0))
    above = len(of_second) - np.searchsorted(of_second, candidates)
    right = above + np.searchsorted(of_first, candidates)
    best = candidates[right == np.max(right)]
    return float(best[np.argmin(np.abs(best - 0.5))])
