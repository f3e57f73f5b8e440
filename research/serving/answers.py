"""What prediction and export say about a photo, for one label per photo or several."""

from __future__ import annotations

import abc
import json
import sys

import keras
import numpy as np
import tensorflow as tf

from research.data.source import SEPARATOR
from research.evaluation.classifier import Classifier
from research.evaluation.multi_label_scores import LabelPredictions
from research.evaluation.scores import Predictions
from research.evaluation.thresholds import (
    Thresholds,
    default_thresholds,
    read_thresholds,
    thresholds_file,
)
from research.runs.console import short_path
from research.tasks.multi_label import has_several_labels


class Answers(abc.ABC):
    """What prediction and export say about a photo.

    Args:
      class_names: by label.
    """

    def __init__(self, class_names: tuple[str, ...]) -> None:
        self.class_names = class_names

    @abc.abstractmethod
    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Returns float64 (photos, classes) from logits (photos, ...)."""

    @abc.abstractmethod
    def chosen(self, probabilities: np.ndarray) -> list[str]:
        """Returns the names of the labels of one photo, from its probabilities (classes,)."""

    @property
    @abc.abstractmethod
    def has_one_label(self) -> bool:
        """Whether each photo has exactly one label."""

    @abc.abstractmethod
    def probability_layer(self, logits: keras.KerasTensor) -> keras.KerasTensor:
        """Returns probabilities (batch, classes) in a functional model."""

    @abc.abstractmethod
    def label_text(self, probabilities: tf.Tensor) -> tf.Tensor:
        """Returns the labels as strings (batch,), from probabilities (batch, classes)."""

    @property
    def thresholds_json(self) -> str | None:
        """The thresholds by class name, as JSON; None if the most probable class is the answer."""
        return None


class OneLabel(Answers):
    """The most probable class."""

    has_one_label = True

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        names = tuple(map(str, range(len(logits))))
        return Predictions(names, np.zeros(len(logits), int), logits).probabilities

    def chosen(self, probabilities: np.ndarray) -> list[str]:
        return [self.class_names[probabilities.argmax()]]

    def probability_layer(self, logits: keras.KerasTensor) -> keras.KerasTensor:
        if logits.shape[1] == 1:  # the logit of the first of two classes is 0
            logits = keras.ops.pad(logits, ((0, 0), (1, 0)))
        return keras.layers.Softmax(name="probabilities")(logits)

    def label_text(self, probabilities: tf.Tensor) -> tf.Tensor:
        return tf.gather(tf.constant(self.class_names), tf.argmax(probabilities, axis=1))


class SeveralLabels(Answers):
    """The classes whose probability is at least their threshold.

    Args:
      class_names: by label.
      thresholds: for each class.
    """

    has_one_label = False

    def __init__(self, class_names: tuple[str, ...], thresholds: Thresholds) -> None:
        super().__init__(class_names)
        self.thresholds = thresholds

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        return LabelPredictions((), np.zeros(logits.shape, bool), logits).probabilities

    @property
    def thresholds_json(self) -> str:
        return json.dumps(self.thresholds.thresholds, indent=2) + "\n"

    def chosen(self, probabilities: np.ndarray) -> list[str]:
        is_chosen = probabilities >= self.thresholds.of(self.class_names)
        return [self.class_names[k] for k in np.flatnonzero(is_chosen)]

    def probability_layer(self, logits: keras.KerasTensor) -> keras.KerasTensor:
        return keras.layers.Activation("sigmoid", name="probabilities")(logits)

    def label_text(self, probabilities: tf.Tensor) -> tf.Tensor:
        is_chosen = probabilities >= tf.constant(self.thresholds.of(self.class_names), tf.float32)
        names = tf.broadcast_to(tf.constant(self.class_names), tf.shape(probabilities))
        chosen = tf.ragged.boolean_mask(names, is_chosen)
        return tf.strings.reduce_join(chosen, axis=1, separator=SEPARATOR)


def answers_of(classifier: Classifier) -> Answers:
    """Returns the answers for a model's kind of labels.

    For several labels, a note on standard error says which thresholds are used.

    Raises:
      UserError: the file of the thresholds is damaged.
    """
    names = classifier.class_names
    if not has_several_labels(type(classifier.task)):
        return OneLabel(names)
    thresholds = read_thresholds(classifier)
    note = (
        f"the thresholds of {short_path(thresholds_file(classifier))} are used"
        if thresholds
        else "0.5 is the threshold of each label; run_eval.py chooses thresholds on the validation "
        "photos for this checkpoint, image size and mirror averaging"
    )
    print(f"note: {note}", file=sys.stderr, flush=True)
    return SeveralLabels(names, thresholds or default_thresholds(names))
