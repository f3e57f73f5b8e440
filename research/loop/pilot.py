"""The pilot: what the frozen features of some photos tell, before the first step of a run."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from research.data.loader import DataLoader
from research.data.split_arrays import SplitArrays
from research.models.split import split_backbone
from research.models.wrapper import Wrapper
from research.settings.automatic import (
    FEWEST_PHOTOS,
    PILOT_PHOTOS,
    SMALLEST_CROP,
    Change,
    Evidence,
)
from research.system.errors import UserError
from research.tasks.labels import check_class_indices
from research.tasks.task import Task

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

BATCH_SIZE = 32
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
PRIORS = (0.01, 0.1, 1.0, 2.0)  # variances of the weights of the regression
USUAL_PRIOR, FOLDS = 1.0, 5


class Pilot:
    """A sample of the training photos, and their frozen features, which are computed once.

    Args:
      model: with the initial weights.
      loader: the photos.
      task: of the run.
      seed: of the sample.

    Attributes:
      model: as given.
    """

    def __init__(self, model: Wrapper, loader: DataLoader, task: Task, seed: int) -> None:
        self.model = model
        self._loader, self._task, self._seed = loader, task, seed

    @functools.cached_property
    def _labels_obstacle(self) -> str | None:
        try:
            check_class_indices(self._examples.labels, self._classes)
        except UserError:
            return "the labels are not one class per photo"
        return None

    @property
    def _examples(self) -> SplitArrays:
        return self._loader.examples("train")

    @property
    def _classes(self) -> int:
        return len(self._loader.class_names)

    @functools.cached_property
    def _sample(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the photos in ascending order, and their pixels, without damaged photos."""
        examples, generator = self._examples, np.random.default_rng(self._seed)
        rows = np.sort(generator.permutation(len(examples))[:PILOT_PHOTOS])
        pixels = examples.inputs[0].take(rows, axis=0)
        if examples.weights is None:
            return rows, pixels
        usable = examples.weights[rows] > 0  # known now that the photos were read
        return rows[usable], pixels[usable]

    @property
    def _labels(self) -> np.ndarray:
        return self._examples.labels[self._sample[0]]

    @functools.cached_property
    def _compute(self) -> Callable[[tf.Tensor], tf.Tensor]:
        """Returns float32 features (batch, channels) of float32 photos."""
        model, preprocessing = self.model, self._loader.preprocessing
        model.backbone.trainable = False  # so that its BatchNorm layers are folded
        backbone = split_backbone(model.backbone, len(model.backbone.layers))
        model.backbone.trainable = True
        shape = (None, *self._sample[1].shape[1:])

        @tf.function(input_signature=[tf.TensorSpec(shape)], autograph=False)
        def compute(images: tf.Tensor) -> tf.Tensor:
            pooled = model.pooling(
                *backbone.activations(preprocessing(images) if preprocessing else images)
            )
            return tf.reshape(tf.cast(pooled, tf.float32), (tf.shape(images)[0], -1))

        return compute

    def _features(self, view: Callable[[tf.Tensor], tf.Tensor]) -> np.ndarray:
        """Returns the features of a view of each photo, float32 (photos, channels)."""
        _, photos = self._sample
        batches = np.split(photos, range(BATCH_SIZE, len(photos), BATCH_SIZE))
        found = [self._compute(view(tf.cast(batch, tf.float32))).numpy() for batch in batches]
        return np.concatenate(found)

    @functools.cached_property
    def _views(self) -> list[np.ndarray]:
        """Features of the photos and of their mirror images."""
        return [self._features(tf.identity), self._features(lambda batch: tf.reverse(batch, [2]))]

    def evidence(self) -> Evidence | str:
        """Returns what the photos tell, or why they tell nothing."""
        if self._labels_obstacle:
            return self._labels_obstacle
        if len(self._labels) < FEWEST_PHOTOS:
            return f"{len(self._labels):,} photos are too few to tell"
        right, mirrored = left_out_predictions(self._views, self._labels, self._classes)
        return Evidence(len(right), float(right.mean()), compare(right, mirrored))

    def cropped(self) -> Change:
        """Returns what central crops of the mean area of random crops change."""
        side = math.sqrt((1 + SMALLEST_CROP) / 2)

        def crop(batch: tf.Tensor) -> tf.Tensor:
            return tf.image.resize(tf.image.central_crop(batch, side), batch.shape[1:3])

        views = [self._views[0], self._features(crop)]
        return compare(*left_out_predictions(views, self._labels, self._classes))

    @functools.cached_property
    def regression_obstacle(self) -> str | None:
        """Why the head cannot start from a logistic regression; None if it can."""
        if self._labels_obstacle:
            return self._labels_obstacle
        if type(self._task).losses is not Task.losses:
            return f"{type(self._task).__name__} has losses of its own"
        head, logits = self.model.head, 1 if self._classes == 2 else self._classes
        is_linear = isinstance(head, keras.layers.Dense) and head.use_bias
        if not is_linear or head.activation is not keras.activations.linear:
            return f"the head of {type(self._task).__name__} is not one linear layer"
        if head.kernel.shape[1] != logits or len(self.model.feature_shape) != 1:
            return f"the head has {head.kernel.shape[1]} logits, and not {logits}"
        missing = np.setdiff1d(np.arange(self._classes), self._labels)
        if len(missing):
            return f"the sample has no photo of {self._loader.class_names[missing[0]]!r}"
        return None

    def start_head(self, mirrored: bool, calibrated: bool) -> None:
        """Assigns the weights of the logistic regression to the head.

        Args:
          mirrored: whether the regression also learns from the mirror images.
          calibrated: as for `fit_head`.
        """
        views = self._views if mirrored else self._views[:1]
        kernel, bias = fit_head(views, self._labels, self._task.class_weights, calibrated)
        self.model.head.kernel.assign(kernel)
        self.model.head.bias.assign(bias)


def compare(right: np.ndarray, other: np.ndarray) -> Change:
    """Compares which photos are predicted correctly, bool (photos,), with those of another view."""
    return Change(lost=int((right & ~other).sum()), won=int((other & ~right).sum()))


def fit_head(
    views: Sequence[np.ndarray],
    labels: np.ndarray,
    class_weights: Sequence[float] | None = None,
    calibrated: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Fits a logistic regression, with the prior variance that predicts left-out photos best.

    The variance of the Gaussian prior of the weights is chosen by the log loss in a stratified
    five-fold cross-validation. It is 1 if a class has only one photo.

    Args:
      views: features of the photos in each view, float (photos, channels).
      labels: int (photos,); each class occurs.
      class_weights: a factor for the losses of each class, also in the cross-validation; None for
        no factors.
      calibrated: whether the logits of each variance are multiplied by the factor of at most 1 that
        predicts the left-out photos best. Such a factor lowers the confidence, and leaves the
        predicted classes as they are. A small variance also lowers the confidence, but changes the
        predicted classes.

    Returns:
      The kernel (channels, logits) and the bias (logits,), float64. Two classes have one logit.
    """
    # Imported late: it takes a second, and few runs need it.
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    stacked = np.stack(views).astype(np.float64)
    # The weights are combinations of the features. In coordinates of the space that the features
    # span, there are fewer of them.
    basis, coordinates = np.linalg.qr(stacked.reshape(-1, stacked.shape[-1]).T)
    within = coordinates.T.reshape(*stacked.shape[:2], -1)
    weights = np.ones(len(labels)) if class_weights is None else np.asarray(class_weights)[labels]

    def repeated(values: np.ndarray) -> np.ndarray:
        return np.tile(values, len(views))

    def fit(photos: np.ndarray, prior: float) -> LogisticRegression:
        regression = LogisticRegression(C=prior / len(views), max_iter=10_000)
        features = np.concatenate(within[:, photos])
        return regression.fit(features, repeated(labels[photos]), repeated(weights[photos]))

    prior, factor, fewest = USUAL_PRIOR, 1.0, int(np.bincount(labels).min())
    if fewest > 1:
        splits = StratifiedKFold(min(FOLDS, fewest), shuffle=True, random_state=0)
        folds = list(splits.split(labels, labels))
        order = np.concatenate([repeated(left_out) for _, left_out in folds])

        def scaled(one: float) -> Scaled:
            logits = np.concatenate(
                [
                    _logits(fit(others, one), np.concatenate(within[:, left_out]))
                    for others, left_out in folds
                ]
            )
            known = logits, labels[order], weights[order]
            return best_factor(*known) if calibrated else Scaled(log_loss(*known), 1.0)

        found = {one: scaled(one) for one in PRIORS}
        prior = min(PRIORS, key=lambda one: found[one].loss)
        factor = found[prior].factor
    regression = fit(np.arange(len(labels)), prior)
    return factor * basis @ regression.coef_.T, factor * regression.intercept_


def _logits(regression: LogisticRegression, features: np.ndarray) -> np.ndarray:
    """Returns the logits of each class, (photos, classes), also for two classes."""
    found = regression.decision_function(features)
    return found if found.ndim == 2 else np.stack([np.zeros_like(found), found], axis=1)


class Scaled(NamedTuple):
    """The log loss in nats of logits that are multiplied by a factor."""

    loss: float
    factor: float


def best_factor(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> Scaled:
    """Returns the factor from 0 to 1 with the smallest log loss (Guo 2017, arXiv 1706.04599).

    Args:
      logits: float (photos, classes).
      labels: int (photos,).
      weights: of the photos, float (photos,).
    """
    from scipy.optimize import minimize_scalar

    def loss(factor: float) -> float:
        return log_loss(factor * logits, labels, weights)

    smaller = minimize_scalar(loss, bounds=(0, 1), method="bounded")
    return min(Scaled(loss(1.0), 1.0), Scaled(float(smaller.fun), float(smaller.x)))


def log_loss(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """Returns the weighted mean log loss in nats; the arguments are those of `best_factor`."""
    from scipy.special import log_softmax

    losses = -log_softmax(logits, axis=1)[np.arange(len(labels)), labels]
    return float(np.average(losses, weights=weights))


def left_out_predictions(
    views: Sequence[np.ndarray], labels: np.ndarray, classes: int
) -> list[np.ndarray]:
    """Predicts each photo by ridge regression on the first view of all other photos.

    The solution without a photo follows from that with all photos (leave-one-out, Rasmussen and
    Williams 2006, Gaussian Processes for Machine Learning, equation 5.12). The penalty is that with
    the smallest squared error.

    Args:
      views: features of the photos in each view, float (photos, channels).
      labels: int (photos,).
      classes: number of classes.

    Returns:
      For each view, bool (photos,): whether the predicted class is right.
    """
    features = np.asarray(views[0], np.float64)
    scale = np.square(features).sum(axis=1).mean()
    targets = np.eye(classes)[labels]
    kernel = features @ features.T / scale
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    for penalty in PENALTIES:
        inverse = np.linalg.inv(kernel + penalty * np.eye(len(kernel)))
        weights = inverse @ targets
        error = np.square(weights / np.diag(inverse)[:, np.newaxis]).sum()
        if best is None or error < best[0]:
            best = error, inverse, weights
    assert best is not None
    _, inverse, weights = best
    right = []
    for view in views:
        similarity = np.asarray(view, np.float64) @ features.T / scale
        own = (similarity * inverse).sum(axis=1) / np.diag(inverse)
        predicted = similarity @ weights - own[:, np.newaxis] * weights
        right.append(predicted.argmax(axis=1) == labels)
    return right
