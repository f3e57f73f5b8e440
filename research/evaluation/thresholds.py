"""The thresholds of a multi-label run: their choice, and the file that keeps them for prediction.

The file is next to the checkpoint. Its name contains the image size and whether mirror images are
averaged, because the probabilities depend on both.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from research.evaluation.classifier import Classifier
from research.runs.durable_files import write_file
from research.system.errors import UserError

DEFAULT = 0.5


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """A threshold for each class.

    Attributes:
      thresholds: by class name. A label is predicted if its probability is at least this.
    """

    thresholds: Mapping[str, float]

    def of(self, class_names: Sequence[str]) -> np.ndarray:
        """Returns float64 (classes,)."""
        return np.array([self.thresholds[name] for name in class_names])


def default_thresholds(class_names: Sequence[str]) -> Thresholds:
    """Returns 0.5 for each class: the more probable answer."""
    return Thresholds(dict.fromkeys(class_names, DEFAULT))


def fit_threshold(positive: np.ndarray, probabilities: np.ndarray) -> float:
    """Returns the threshold that gives one class the highest F1; 0.5 if no photo has the label.

    This is the strategy SCut (Yang 2001, A study of thresholding strategies for text
    categorization) for F1. Of several best thresholds, the one closest to 0.5 is returned.

    Args:
      positive: bool (photos,), whether a photo has the label.
      probabilities: float (photos,), the predicted probabilities of the label.
    """
    if not positive.any():
        return DEFAULT
    ordered = np.unique(probabilities)
    between = (ordered[1:] + ordered[:-1]) / 2
    candidates = np.array([DEFAULT, *between, ordered[0]])
    chosen, hits = (
        len(scores) - np.searchsorted(np.sort(scores), candidates)
        for scores in (probabilities, probabilities[positive])
    )
    f1 = 2 * hits / (chosen + positive.sum())
    best = candidates[f1 == f1.max()]
    return float(best[np.argmin(np.abs(best - DEFAULT))])


def thresholds_file(classifier: Classifier) -> Path:
    """Returns the path of the thresholds for a checkpoint, image size and mirror averaging."""
    config = classifier.config
    mirrored = "-mirrored" if config.mirror_averaging else ""
    return Path(f"{classifier.checkpoint}.thresholds-{config.image_size}px{mirrored}.json")


def write_thresholds(classifier: Classifier, thresholds: Thresholds) -> None:
    """Writes thresholds next to the checkpoint; raises `UserError` if this fails."""
    content = {"weights": classifier.fingerprint, "thresholds": thresholds.thresholds}
    write_file(thresholds_file(classifier), json.dumps(content, indent=2) + "\n")


def read_thresholds(classifier: Classifier) -> Thresholds | None:
    """Returns the thresholds of a checkpoint; None if none were chosen for its weights.

    Raises:
      UserError: the file is damaged.
    """
    file = thresholds_file(classifier)
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = {name: float(content["thresholds"][name]) for name in classifier.class_names}
        if len(content["thresholds"]) != len(found) or not all(0 <= x <= 1 for x in found.values()):
            raise ValueError("expected one number from 0 to 1 per class")
        weights = content["weights"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{str(file)!r} does not contain the thresholds of the run's classes "
            f"({type(error).__name__}: {error}); delete it, and run run_eval.py, "
            "which chooses them again"
        ) from error
    return Thresholds(found) if weights == classifier.fingerprint else None
