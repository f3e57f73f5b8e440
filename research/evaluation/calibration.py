"""Fits a temperature and a decision threshold on validation photos."""

from __future__ import annotations

import math

import numpy as np
from scipy import optimize

from research.evaluation.scores import Decisions, Predictions, of_label


def decide(validation: Predictions) -> Decisions:
    """Fits temperature and threshold on photos that the model was not trained on."""
    is_binary = validation.logits.shape[1] == 1
    return Decisions(fit_temperature(validation), fit_threshold(validation) if is_binary else None)


def fit_temperature(predictions: Predictions) -> float:
    """Returns the divisor of the logits that minimizes the loss (arXiv 1706.04599).

    It is above 1 if the model is overconfident. The loss is the cross-entropy with
    `smoothed_targets`. With hard labels, the best temperature would be 0 if no photo is
    misclassified, and the loss of a mistake on other photos would then be unbounded.
    """
    own, other = smoothed_targets(len(predictions), predictions.classes)

    def likelihood(given: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return (own - other) * of_label(given, labels) + other * given.sum(axis=1)

    def loss(log_temperature: float) -> float:
        return -float(predictions.reduced(likelihood, math.exp(log_temperature)).mean())

    bounds = math.log(1e-3), math.log(1e3)  # reached if the logits carry no information
    return math.exp(optimize.minimize_scalar(loss, bounds=bounds, method="bounded").x)


def smoothed_targets(photos: int, classes: int) -> tuple[float, float]:
    """Returns target probabilities that n photos support (after Platt 1999, section 2.2).

    The target of a photo's own class is (n + 1) / (n + 2): the posterior mean after n successes and
    no failure, with a uniform prior. The rest is spread evenly over the other classes. Platt
    smooths each class separately, because his curve also has an offset. A temperature is one number
    for all classes. With many classes of few photos each, one failure per class would outweigh the
    photos.

    Args:
      photos: number of photos.
      classes: number of classes, at least 2.

    Returns:
      The targets of the own class and of each other class, which sum to 1.
    """
    rest = 1 / (photos + 2)
    return 1 - rest, rest / (classes - 1)


def fit_threshold(predictions: Predictions) -> float:
    """Returns the threshold on the second class's probability that gives the highest accuracy.

    The second class is predicted from this probability on. Of several best thresholds, the one
    closest to 0.5 is returned.
    """
    scores = predictions.probabilities[:, 1]
    ordered = np.unique(scores)
    between = (ordered[1:] + ordered[:-1]) / 2
    candidates = np.array([0.5, *between, ordered[0], np.nextafter(ordered[-1], 2)])
    second, first = (np.sort(scores[predictions.labels == label]) for label in (1, 0))
    correct = len(second) - np.searchsorted(second, candidates) + np.searchsorted(first, candidates)
    best = candidates[correct == np.max(correct)]
    return float(best[np.argmin(np.abs(best - 0.5))])
