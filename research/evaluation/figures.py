"""Plots of an evaluation: confusion matrix, reliability diagram, curves, misclassified photos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from PIL import Image
from sklearn import metrics
from sklearn.metrics import ConfusionMatrixDisplay

from research.evaluation.scores import Predictions, calibration_table, confusion, wilson_interval
from research.runs.photo_grid import plain
from research.runs.pictures import DEFAULT_STYLE, escape_formulas

MAX_CURVES = 10
MAX_POINTS = 2000  # of a curve
MAX_INSIDE = 6  # curves whose legend is inside the axes
MAX_MISTAKES = 20
MAX_CLASSES_WITH_INTERVALS = 4
MAX_CLASSES_WITH_COUNTS = 50
MAX_CLASSES = 100  # of a confusion matrix with all classes
MAX_NAME_LENGTH = 26  # characters above a photo


class Curve(NamedTuple):
    """The data of one class's one-against-rest curve.

    Attributes:
      name: name of the class.
      of_class: bool (photos,), whether a photo belongs to the class.
      probabilities: float (photos,), predicted probability of the class.
    """

    name: str
    of_class: np.ndarray
    probabilities: np.ndarray


@DEFAULT_STYLE
def confusion_matrix(predictions: Predictions, class_names: Sequence[str]) -> Figure:
    """Draws numbers of photos by true class (rows) and predicted class (columns).

    Colours show shares of the class's photos. Up to 4 classes, each cell also shows its share with
    a 95 % Wilson interval; above 50 classes, cells show only colours. Of more than 100 classes, the
    50 that are confused most often are drawn.
    """
    pairs, numbers = confusion(predictions.labels, predictions.predicted)
    photos = np.bincount(predictions.labels, minlength=len(class_names))
    chosen = np.arange(len(class_names))
    if len(chosen) > MAX_CLASSES:
        chosen = np.sort(most_confused(pairs, numbers, len(chosen))[:MAX_CLASSES_WITH_COUNTS])
    classes = len(chosen)
    places = np.full(len(class_names), -1)
    places[chosen] = np.arange(classes)
    drawn = (places[pairs] >= 0).all(axis=1)
    counts = np.zeros((classes, classes), int)
    counts[tuple(places[pairs[drawn]].T)] = numbers[drawn]
    totals = photos[chosen][:, np.newaxis]
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    side = min(max(4.5, 1.5 + 0.45 * classes), 24.0)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axis = figure.subplots()
    names = [escape_formulas(plain(class_names[k], MAX_NAME_LENGTH)) for k in chosen.tolist()]
    shown = ConfusionMatrixDisplay(shares, display_labels=names)
    shown.plot(ax=axis, cmap="Blues", include_values=False, im_kw={"vmin": 0, "vmax": 1})
    shown.im_.colorbar.set_label("share of the class's photos")
    axis.set(xlabel="predicted class", ylabel="true class")
    if classes < len(class_names):
        axis.set_title(
            f"the {classes} of {len(class_names):,} classes that are confused most often"
        )
    axis.tick_params(axis="x", rotation=90 if classes > MAX_CLASSES_WITH_INTERVALS else 0)
    if classes > MAX_CLASSES_WITH_COUNTS:
        axis.tick_params(labelsize=max(2.0, 700 / classes))
        return figure
    for row, column in np.argwhere((counts > 0) | (classes <= MAX_CLASSES_WITH_INTERVALS)):
        text = f"{counts[row, column]:,}"
        interval = wilson_interval(counts[row, column], totals[row, 0])
        if classes <= MAX_CLASSES_WITH_INTERVALS and interval:
            text += f"\n{shares[row, column]:.1%}\n{interval[0]:.1%} to {interval[1]:.1%}"
        colour = "white" if shares[row, column] > 0.5 else "black"
        axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    return figure


def most_confused(pairs: np.ndarray, numbers: np.ndarray, classes: int) -> np.ndarray:
    """Returns all classes, int (classes,), those of the most frequent mistakes first.

    Args:
      pairs: int (pairs, 2), true and predicted classes.
      numbers: int (pairs,), the number of photos of each pair.
      classes: number of classes.
    """
    is_mistake = pairs[:, 0] != pairs[:, 1]
    order = np.argsort(-numbers[is_mistake], kind="stable")
    found = [*pairs[is_mistake][order].ravel().tolist(), *range(classes)]
    return np.array(list(dict.fromkeys(found)))


class Calibrated(NamedTuple):
    """Probabilities to compare with the share of events.

    Attributes:
      title: for the legend.
      probabilities: float (events,).
      happened: bool (events,).
    """

    title: str
    probabilities: np.ndarray
    happened: np.ndarray


@DEFAULT_STYLE
def reliability(
    given: Sequence[Calibrated], lowest: float, probability: str, share: str, count: str
) -> Figure:
    """Draws shares of events over probabilities with 95 % Wilson intervals, above a histogram.

    Args:
      given: up to two sets of probabilities.
      lowest: the lowest possible probability.
      probability: what the probabilities are, for the horizontal axis.
      share: what the shares are, for the vertical axis.
      count: what is counted, for the vertical axis of the histogram.
    """
    figure = Figure(figsize=(5.5, 6.5), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    above.plot([0, 1], [0, 1], color="grey", linewidth=0.8, label="perfect calibration")
    bins = np.linspace(lowest, 1, 16).tolist()
    for colour, (title, probabilities, happened) in zip(("C0", "C1"), given, strict=False):
        table = calibration_table(probabilities, happened)
        bars = zip(table.accuracy, table.photos, strict=True)
        low, high = np.array([wilson_interval(rate * number, number) for rate, number in bars]).T
        above.errorbar(
            table.confidence,
            table.accuracy,
            yerr=np.maximum([table.accuracy - low, high - table.accuracy], 0.0),
            fmt="none",
            ecolor=colour,
            elinewidth=0.8,
            alpha=0.6,
        )
        # Bins with few photos have small points. Lines between points would hide that.
        sizes = 15 + 120 * np.sqrt(table.photos / table.photos.sum())
        above.scatter(table.confidence, table.accuracy, sizes, color=colour, label=title, zorder=3)
        below.hist(probabilities, bins=bins, histtype="step", color=colour, linewidth=1.5)
    above.set(ylabel=share, xlim=(lowest - 0.02, 1.02), ylim=(-0.03, 1.03))
    above.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    below.set(xlabel=probability, ylabel=count)
    below.set_yscale("symlog", linthresh=1)
    below.yaxis.set_major_formatter(ScalarFormatter())
    below.grid(alpha=0.3)
    return figure


@DEFAULT_STYLE
def roc_curves(curves: Sequence[Curve], classes: int, pooled: Curve | None = None) -> Figure:
    """Draws ROC curves of the worst of a number of classes, and one over all classes in black."""
    figure, axis = _square(classes)
    for curve in [*curves, *([pooled] if pooled else [])]:
        false, true, _ = metrics.roc_curve(curve.of_class, curve.probabilities)
        label = _named(curve, "AUC", metrics.auc(false, true))
        axis.plot(false, true, label=label, color="black" if curve is pooled else None)
    axis.plot([0, 1], [0, 1], ":", color="grey", label="chance")
    axis.set(xlabel="false positive rate", ylabel="true positive rate")
    _add_legend(figure, axis, "lower right")
    return figure


@DEFAULT_STYLE
def precision_recall_curves(
    curves: Sequence[Curve], classes: int, pooled: Curve | None = None
) -> Figure:
    """Draws the curves of the worst of a number of classes, and one over all classes in black."""
    figure, axis = _square(classes)
    for curve in [*curves, *([pooled] if pooled else [])]:
        precision, recall, _ = metrics.precision_recall_curve(curve.of_class, curve.probabilities)
        average = metrics.average_precision_score(curve.of_class, curve.probabilities)
        # More points than pixels would only take time.
        drawn = np.linspace(0, len(recall) - 1, min(len(recall), MAX_POINTS)).astype(int)
        label = _named(curve, "AP", average)
        colour = "black" if curve is pooled else None
        axis.step(recall[drawn], precision[drawn], where="post", label=label, color=colour)
    axis.set(xlabel="recall", ylabel="precision")
    _add_legend(figure, axis, "lower left")
    return figure


def _add_legend(figure: Figure, axis: Axes, place: Literal["lower left", "lower right"]) -> None:
    """Adds a legend inside the axes, or below them if it would hide the curves."""
    if len(axis.lines) <= MAX_INSIDE:
        axis.legend(loc=place, fontsize=9)
        return
    figure.set_size_inches(6.5, 7.5)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)


def _named(curve: Curve, figure: str, value: float) -> str:
    name = escape_formulas(plain(curve.name, MAX_NAME_LENGTH))
    return f"{name} ({figure} = {value:.3f})"


def _square(classes: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.5, 5.5), layout="constrained")
    axis = figure.subplots()
    axis.grid(alpha=0.3)
    if classes > MAX_CURVES:
        axis.set_title(f"the {MAX_CURVES} worst of {classes} classes")
    return figure, axis


def one_against_rest(predictions: Predictions, class_names: Sequence[str]) -> list[Curve]:
    """Returns the curve data of each class, of the second one only if there are two classes.

    With more than 10 classes, the 10 worst are returned: those with the lowest mean probability of
    the class over its own photos. A class with no photos or with all photos has no curve.
    """
    labels, classes = predictions.labels, len(class_names)
    photos = np.bincount(labels, minlength=classes)
    given = np.bincount(labels, np.exp(-predictions.losses()), classes) / np.maximum(photos, 1)
    ordered = np.array([1]) if classes == 2 else np.argsort(given, kind="stable")
    chosen = ordered[(photos[ordered] > 0) & (photos[ordered] < len(labels))][:MAX_CURVES]
    probabilities = predictions.reduced(lambda logs, _: np.exp(logs[:, chosen]))
    return [
        Curve(class_names[k], labels == k, column)
        for k, column in zip(chosen, probabilities.T, strict=True)
    ]


def most_confident_mistakes(predictions: Predictions, limit: int = MAX_MISTAKES) -> np.ndarray:
    """Returns the rows of misclassified photos, the most confident prediction first."""
    wrong = np.flatnonzero(~predictions.correct)
    return wrong[np.argsort(-predictions.confidence[wrong], kind="stable")][:limit]


def mistake_titles(
    rows: np.ndarray, predictions: Predictions, class_names: Sequence[str]
) -> list[str]:
    """Returns file name, label, prediction and confidence of misclassified photos.

    Args:
      rows: int (rows,), their rows in `predictions`.
      predictions: the predictions for all photos.
      class_names: the class names in the order of their labels.
    """
    names = [plain(name, MAX_NAME_LENGTH - 6) for name in class_names]
    return [
        f"{plain(predictions.names[row], MAX_NAME_LENGTH)}\n"
        f"{names[predictions.labels[row]]}, predicted\n"
        f"{names[predictions.predicted[row]]} {predictions.confidence[row]:.3f}"
        for row in rows
    ]


def overlaid(photos: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Overlays photos with heat maps. A photo is grey where its map is 0.

    Args:
      photos: uint8 (photos, height, width, 3).
      maps: float (photos, height', width') in [0, 1].

    Returns:
      uint8 (photos, height, width, 3).
    """
    height, width = photos.shape[1:3]
    overlaid_photos = []
    for photo, values in zip(photos, maps, strict=True):
        heat_map = Image.fromarray(np.asarray(values, np.float32))
        heat_map = heat_map.resize((width, height), Image.Resampling.BICUBIC)
        shares = np.clip(np.asarray(heat_map), 0, 1)
        grey = np.asarray(Image.fromarray(photo).convert("L").convert("RGB"))
        opacity = 0.6 * shares[..., np.newaxis] ** 0.5
        photo = (1 - opacity) * grey + opacity * 255 * colormaps["turbo"](shares)[..., :3]
        overlaid_photos.append(photo.astype("u1"))
    return np.stack(overlaid_photos)
