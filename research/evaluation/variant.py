"""`Variant`: what evaluation does with the logits of one kind of labels.

`SingleLabel` and `MultiLabel` are the two variants. `variant_of` chooses by the task of a run.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from matplotlib.figure import Figure as Plot

from research.evaluation.classifier import Classifier
from research.evaluation.figures import Curve
from research.evaluation.results import Scores
from research.evaluation.scores import Resamples


class Predicted(Protocol):
    """The predictions for some photos: names, labels (photos, ...), and logits (photos, ...)."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def labels(self) -> np.ndarray: ...
    @property
    def logits(self) -> np.ndarray: ...
    def __len__(self) -> int: ...
    def losses(self) -> np.ndarray: ...


P = TypeVar("P", bound=Predicted)
S = TypeVar("S", bound=Scores)


class Shown(NamedTuple):
    """Photos that a person should look at.

    Attributes:
      name: of the picture.
      rows: int (shown,), their rows in the predictions.
      titles: the lines above each photo.
      classes: int (shown,), the class whose evidence the heat map of each photo shows.
    """

    name: str
    rows: np.ndarray
    titles: list[str]
    classes: np.ndarray


class Variant(abc.ABC, Generic[P, S]):
    """What evaluation does with the logits of one kind of labels.

    Args:
      class_names: by label.

    Attributes:
      built_in_figures: figures of the built-in task that are also metrics of the evaluation.
    """

    built_in_figures: ClassVar[frozenset[str]]

    def __init__(self, class_names: tuple[str, ...]) -> None:
        self.class_names = class_names

    def is_built_in(self, figure: str) -> bool:
        """Whether a figure of a task is that of the built-in task, also for one class."""
        return figure in self.built_in_figures

    @abc.abstractmethod
    def check_labels(self, labels: np.ndarray) -> None:
        """Raises `UserError` for labels (photos, ...) of another kind."""

    @abc.abstractmethod
    def predictions(self, names: tuple[str, ...], labels: np.ndarray, logits: np.ndarray) -> P:
        """Returns the predictions for photos, whose labels `check_labels` accepts."""

    @abc.abstractmethod
    def decide(self, validation: P) -> Any:
        """Returns what is fitted on validation photos: a dataclass."""

    def keep(self, decisions: Any, classifier: Classifier) -> None:
        """Writes what prediction needs of the decisions; raises `UserError` if this fails."""

    @abc.abstractmethod
    def score(self, predictions: P, decisions: Any, resamples: int) -> S:
        """Returns the metrics. `decisions` is None if there were no validation photos."""

    @abc.abstractmethod
    def differences(
        self, one: P, other: P, rows: Resamples
    ) -> dict[str, tuple[float, Sequence[float]]]:
        """Returns metrics of one minus those of the other, for the same photos in the same order.

        Args:
          one: predictions.
          other: of another model.
          rows: the rows of the photos of each resample.

        Returns:
          By name: the value for all photos, and that for each resample.
        """

    @abc.abstractmethod
    def csv(self, predictions: P, decisions: Any) -> str:
        """Returns CSV with one line per photo, with the columns `file`, `label` and `predicted`."""

    @abc.abstractmethod
    def plots(self, predictions: P, scores: S) -> dict[str, Plot]:
        """Returns pictures by name."""

    @abc.abstractmethod
    def curves(self, predictions: P) -> list[Curve]:
        """Returns the data of the curves of some classes."""

    def curve_tag(self, curve: Curve) -> str:
        """Returns the tag of a precision-recall curve in TensorBoard."""
        return f"precision_recall/{curve.name}"

    @abc.abstractmethod
    def shown(self, predictions: P, decisions: Any) -> Shown:
        """Returns up to 20 photos that were predicted badly, the worst first."""
