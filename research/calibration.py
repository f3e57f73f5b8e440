"""What is chosen on validation photos, to be used on others: a temperature and a threshold."""

from __future__ import annotations

import math

import numpy as np
from scipy import optimize

from research.scores import Decisions, Predictions

TEMPERATURES = (0.05, 20.0)


def decide(validation: Predictions) -> Decisions:
    """Chooses temperature and threshold on photos that were not trained on."""
    is_binary = validation.logits.shape[1] == 1
    return Decisions(fit_temperature(validation), fit_threshold(validation) if is_binary else None)


def fit_temperature(predictions: Predictions) -> float:
    """Returns what to divide logits by so that the loss is least (arXiv 1706.04599).

    Above 1 where a model is too sure. Between 0.05 and 20: without a mistake it would fall to 0.
    """
    bounds = tuple(map(math.log, TEMPERATURES))
    found = optimize.minimize_scalar(
        lambda log: predictions.losses(math.exp(log)).mean(), bounds=bounds, method="bounded"
    )
    return math.exp(found.x)


def fit_threshold(predictions: Predictions) -> float:
    """Returns the probability of the second class from which on predicting it is most often right.

    Among equally good ones the nearest to one half.
    """
    scores = predictions.probabilities[:, 1]
    ordered = np.unique(scores)
    candidates = np.concatenate([[0.5], (ordered[1:] + ordered[:-1]) / 2])
    right = ((scores >= candidates[:, np.newaxis]) == predictions.labels).sum(axis=1)
    best = candidates[right == right.max()]
    return float(best[np.abs(best - 0.5).argmin()])
