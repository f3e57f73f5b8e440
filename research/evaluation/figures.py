"""Pictures of an evaluation: what is confused, how well confidence is founded, which mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from PIL import Image
from sklearn import metrics
from sklearn.metrics import ConfusionMatrixDisplay

from research.evaluation.intervals import wilson_interval
from research.evaluation.scores import CalibrationTable, Predictions, calibration_table, confusion
from research.runs.pictures import no_formula, photo_grid, plain

MOST_CURVES = 10
MOST_MISTAKES = 20
MOST_CLASSES_IN_WORDS = 4  # whose cells have room for an interval
MOST_CLASSES_IN_NUMBERS = 50
LONGEST_NAME = 26  # letters above a photo


class Curve(NamedTuple):
    """What tells one class from the rest: bool and float (photos,), of the class's own name."""

    name: str
    of_class: np.ndarray
    probabilities: np.ndarray


def confusion_matrix(predictions: Predictions, class_names: Sequence[str]) -> Figure:
    """Draws how many photos of each class (rows) are predicted as which (columns).

    Colours show shares of the row; of a few classes, each share stands there with its 95 % Wilson
    interval; of very many, colours alone.
    """
    counts, classes = confusion(predictions, len(class_names)), len(class_names)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    side = min(max(4.5, 1.5 + 0.45 * classes), 24.0)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axis = figure.subplots()
    names = [no_formula(plain(name, LONGEST_NAME)) for name in class_names]
    shown = ConfusionMatrixDisplay(shares, display_labels=names)
    shown.plot(ax=axis, cmap="Blues", include_values=False, im_kw={"vmin": 0, "vmax": 1})
    shown.im_.colorbar.set_label("share of the class's photos")
    axis.set(xlabel="predicted class", ylabel="true class")
    axis.tick_params(axis="x", rotation=90 if classes > MOST_CLASSES_IN_WORDS else 0)
    if classes > MOST_CLASSES_IN_NUMBERS:
        axis.tick_params(labelsize=max(2.0, 700 / classes))
        return figure
    for row, column in np.argwhere((counts > 0) | (classes <= MOST_CLASSES_IN_WORDS)):
        text = f"{counts[row, column]:,}"
        interval = wilson_interval(counts[row, column], totals[row, 0])
        if classes <= MOST_CLASSES_IN_WORDS and interval:
            text += f"\n{shares[row, column]:.1%}\n{interval[0]:.1%} to {interval[1]:.1%}"
        colour = "white" if shares[row, column] > 0.5 else "black"
        axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    return figure


def reliability(predictions: Predictions, after: Predictions | None = None) -> Figure:
    """Draws accuracy over confidence with 95 % Wilson intervals, and how many photos have which.

    Args:
      predictions: of a split.
      after: the same with logits divided by a temperature, to draw both.
    """
    figure = Figure(figsize=(5.5, 6.5), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    above.plot([0, 1], [0, 1], color="grey", linewidth=0.8, label="perfect calibration")
    lowest = 1 / predictions.probabilities.shape[1]
    bins = np.linspace(lowest, 1, 16).tolist()
    given = (("as trained", "C0", predictions), ("after temperature scaling", "C1", after))
    for title, colour, drawn in given:
        if drawn is None:
            continue
        table = calibration_table(drawn.confidence, drawn.correct)
        above.errorbar(
            table.confidence,
            table.accuracy,
            yerr=_distances_to_intervals(table),
            fmt="none",
            ecolor=colour,
            elinewidth=0.8,
            alpha=0.6,
        )
        # What rests on a few photos is small; lines from point to point would hide that.
        sizes = 15 + 120 * np.sqrt(table.photos / table.photos.sum())
        above.scatter(table.confidence, table.accuracy, sizes, color=colour, label=title, zorder=3)
        below.hist(drawn.confidence, bins=bins, histtype="step", color=colour, linewidth=1.5)
    above.set(ylabel="accuracy", xlim=(lowest - 0.02, 1.02), ylim=(-0.03, 1.03))
    above.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    below.set(xlabel="confidence: probability of the predicted class", ylabel="photos")
    below.set_yscale("symlog", linthresh=1)
    below.yaxis.set_major_formatter(ScalarFormatter())
    below.grid(alpha=0.3)
    return figure


def _distances_to_intervals(table: CalibrationTable) -> np.ndarray:
    """Returns how far down and up the interval of each accuracy reaches, (2, bins)."""
    intervals = [
        wilson_interval(accuracy * photos, photos)
        for accuracy, photos in zip(table.accuracy, table.photos, strict=True)
    ]
    low, high = np.array(intervals).T
    return np.maximum([table.accuracy - low, high - table.accuracy], 0.0)


def roc_curves(predictions: Predictions, class_names: Sequence[str]) -> Figure:
    """Draws true over false positive rates, a curve a class against the rest."""
    figure, axis = _square(len(class_names))
    for curve in one_against_rest(predictions, class_names):
        false, true, _ = metrics.roc_curve(curve.of_class, curve.probabilities)
        axis.plot(false, true, label=_named(curve, "AUC", metrics.auc(false, true)))
    axis.plot([0, 1], [0, 1], ":", color="grey", label="chance")
    axis.set(xlabel="false positive rate", ylabel="true positive rate")
    axis.legend(loc="lower right", fontsize=9)
    return figure


def precision_recall_curves(predictions: Predictions, class_names: Sequence[str]) -> Figure:
    """Draws precision over recall, a curve a class against the rest."""
    figure, axis = _square(len(class_names))
    for curve in one_against_rest(predictions, class_names):
        precision, recall, _ = metrics.precision_recall_curve(curve.of_class, curve.probabilities)
        average = metrics.average_precision_score(curve.of_class, curve.probabilities)
        axis.step(recall, precision, where="post", label=_named(curve, "AP", average))
    axis.set(xlabel="recall", ylabel="precision")
    axis.legend(loc="lower left", fontsize=9)
    return figure


def _named(curve: Curve, figure: str, value: float) -> str:
    return f"{no_formula(plain(curve.name))} ({figure} = {value:.3f})"


def _square(classes: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.5, 5.5), layout="constrained")
    axis = figure.subplots()
    axis.grid(alpha=0.3)
    if classes > MOST_CURVES:
        axis.set_title(f"the {MOST_CURVES} of {classes} classes that are recognised worst")
    return figure, axis


def one_against_rest(predictions: Predictions, class_names: Sequence[str]) -> list[Curve]:
    """Returns each class against the rest: of two, the second alone; of many, the ten worst.

    The worst is the one whose own photos get the least probability of it. Classes without photos,
    or with all of them, have no curve.
    """
    probabilities, labels = predictions.probabilities, predictions.labels
    of_class = labels[:, np.newaxis] == np.arange(len(class_names))
    photos = of_class.sum(axis=0)
    given = (probabilities * of_class).sum(axis=0) / np.maximum(photos, 1)
    classes = [1] if len(class_names) == 2 else np.argsort(given, kind="stable")
    return [
        Curve(class_names[k], of_class[:, k], probabilities[:, k])
        for k in classes
        if 0 < photos[k] < len(labels)
    ][:MOST_CURVES]


def most_confident_mistakes(predictions: Predictions, most: int = MOST_MISTAKES) -> np.ndarray:
    """Returns the rows of the photos that are classified wrongly, the most confident first."""
    wrong = np.flatnonzero(~predictions.correct)
    return wrong[np.argsort(-predictions.confidence[wrong], kind="stable")][:most]


def mistakes(
    photos: np.ndarray, rows: np.ndarray, predictions: Predictions, class_names: Sequence[str]
) -> Figure:
    """Draws photos with their file name, what they are, and what they are taken for.

    Args:
      photos: uint8 (rows, height, width, 3), perhaps overlaid.
      rows: which predictions they belong to.
      predictions: of all photos.
      class_names: by label.
    """
    names = [plain(name, LONGEST_NAME - 6) for name in class_names]
    titled = [
        (
            photo,
            f"{plain(predictions.names[row], LONGEST_NAME)}\n"
            f"{names[predictions.labels[row]]}, taken for\n"
            f"{names[predictions.predicted[row]]} {predictions.confidence[row]:.3f}",
        )
        for photo, row in zip(photos, rows, strict=True)
    ]
    return photo_grid(titled)


def overlaid(photos: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Returns photos, uint8 (photos, height, width, 3), with maps in [0, 1] laid over in colour.

    The photo shows through, and is in shades of grey where the map is 0.
    """
    height, width = photos.shape[1:3]
    colours = colormaps["turbo"]
    laid = []
    for photo, values in zip(photos, maps, strict=True):
        whole = Image.fromarray(np.asarray(values, np.float32)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        shares = np.clip(np.asarray(whole), 0, 1)
        grey = np.asarray(Image.fromarray(photo).convert("L").convert("RGB"))
        opacity = 0.6 * shares[..., np.newaxis] ** 0.5
        laid.append(((1 - opacity) * grey + opacity * 255 * colours(shares)[..., :3]).astype("u1"))
    return np.stack(laid)
