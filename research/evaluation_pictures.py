"""Pictures of an evaluation: what is confused, how well confidence is founded, which mistakes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import ConfusionMatrixDisplay, PrecisionRecallDisplay, RocCurveDisplay
from sklearn.preprocessing import label_binarize

from research.pictures import photo_grid
from research.scores import (
    CalibrationTable,
    Predictions,
    calibration_table,
    confusion,
    wilson_interval,
)

MOST_CURVES = 10
MOST_MISTAKES = 20


def confusion_matrix(predictions: Predictions, class_names: Sequence[str]) -> Figure:
    """Draws how many photos of each class (rows) are predicted as which (columns).

    Colours show shares of the row; of a few classes, each share stands there with its 95 % Wilson
    interval.
    """
    counts = confusion(predictions, len(class_names))
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    side = max(4.5, 1.5 + 0.45 * len(class_names))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axis = figure.subplots()
    shown = ConfusionMatrixDisplay(shares, display_labels=class_names)
    shown.plot(ax=axis, cmap="Blues", include_values=False, im_kw={"vmin": 0, "vmax": 1})
    axis.set(xlabel="predicted", ylabel="class")
    axis.tick_params(axis="x", rotation=90 if len(class_names) > 4 else 0)
    for row, column in np.ndindex(counts.shape):
        text = f"{counts[row, column]:,}"
        interval = wilson_interval(counts[row, column], totals[row, 0])
        if len(class_names) <= 4 and interval:
            text += f"\n{shares[row, column]:.1%}\n{interval[0]:.1%} to {interval[1]:.1%}"
        if counts[row, column] or len(class_names) <= 4:
            colour = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    return figure


def reliability(predictions: Predictions, after: Predictions | None = None) -> Figure:
    """Draws accuracy over confidence with 95 % Wilson intervals, and how many photos have which.

    Args:
      predictions: of a split.
      after: the same with logits divided by a temperature, to draw both.
    """
    figure = Figure(figsize=(5.5, 6), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    above.plot([0, 1], [0, 1], color="grey", linewidth=0.8, label="well founded")
    for title, drawn in (("as it is", predictions), ("at temperature", after)):
        if drawn is not None:
            table = calibration_table(drawn.labels, drawn.probabilities)
            above.errorbar(
                table.confidence,
                table.accuracy,
                yerr=_distances_to_intervals(table),
                marker="o",
                markersize=4,
                elinewidth=0.8,
                label=title,
            )
    lowest = 1 / predictions.probabilities.shape[1]
    above.set(ylabel="accuracy", xlim=(lowest - 0.02, 1.02), ylim=(-0.02, 1.02))
    above.grid(alpha=0.3)
    above.legend()
    below.hist(predictions.probabilities.max(axis=1), bins=np.linspace(lowest, 1, 16).tolist())
    below.set(xlabel="confidence: probability of the predicted class", ylabel="photos")
    below.set_yscale("symlog", linthresh=1)
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
    figure, axis = _square()
    for name, labels, scores in _one_against_rest(predictions, class_names):
        RocCurveDisplay.from_predictions(labels, scores, name=name, ax=axis)
    axis.set(xlabel="false positive rate", ylabel="true positive rate")
    return figure


def precision_recall_curves(predictions: Predictions, class_names: Sequence[str]) -> Figure:
    """Draws precision over recall, a curve a class against the rest."""
    figure, axis = _square()
    for name, labels, scores in _one_against_rest(predictions, class_names):
        PrecisionRecallDisplay.from_predictions(labels, scores, name=name, ax=axis)
    axis.set(xlabel="recall", ylabel="precision")
    return figure


def _square() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.5, 5.5), layout="constrained")
    axis = figure.subplots()
    axis.grid(alpha=0.3)
    return figure, axis


def _one_against_rest(
    predictions: Predictions, class_names: Sequence[str]
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Returns name, labels (1 for the class) and scores: of two classes, the second one alone.

    Of many classes the ten that are worst recognised; none of which there are no photos.
    """
    if predictions.logits.shape[1] == 1:
        of_class = [(class_names[1], predictions.labels, predictions.logits[:, 0])]
    else:
        labels = label_binarize(predictions.labels, classes=range(len(class_names)))
        scores = predictions.probabilities
        columns = np.argsort((scores * labels).sum(axis=0) / np.maximum(labels.sum(axis=0), 1))
        of_class = [(class_names[k], labels[:, k], scores[:, k]) for k in columns]
    return [one for one in of_class if 0 < one[1].sum() < len(one[1])][:MOST_CURVES]


def most_confident_mistakes(predictions: Predictions, most: int = MOST_MISTAKES) -> np.ndarray:
    """Returns the rows of the photos that are classified wrongly, the most confident first."""
    wrong = np.flatnonzero(predictions.predicted != predictions.labels)
    confidence = predictions.probabilities.max(axis=1)[wrong]
    return wrong[np.argsort(-confidence, kind="stable")][:most]


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
    titled = []
    for photo, row in zip(photos, rows, strict=True):
        predicted = predictions.predicted[row]
        probability = predictions.probabilities[row, predicted]
        label = class_names[predictions.labels[row]]
        name = predictions.names[row]
        name = name if len(name) <= 30 else f"...{name[-27:]}"
        titled.append(
            (photo, f"{name}\n{label}, taken for\n{class_names[predicted]} {probability:.3f}")
        )
    return photo_grid(titled)


def overlaid(photos: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Returns photos, uint8 (photos, height, width, 3), with maps in [0, 1] laid over in colour."""
    height, width = photos.shape[1:3]
    colours = colormaps["turbo"]
    laid = []
    for photo, values in zip(photos, maps, strict=True):
        resized = Image.fromarray(np.float32(values)).resize(
            (width, height), Image.Resampling.BILINEAR
        )
        colour = 255 * colours(np.asarray(resized))[..., :3]
        laid.append((0.55 * photo + 0.45 * colour).astype(np.uint8))
    return np.stack(laid)


def learning_curves(runs: Sequence[tuple[str, Sequence[dict[str, float]]]]) -> Figure:
    """Draws validation loss and accuracy of several runs by epoch, from rows of metrics.jsonl."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axis, metric in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for name, rows in runs:
            epochs = [row["epoch"] for row in rows]
            (line,) = axis.plot(epochs, [row[f"validation_{metric}"] for row in rows], label=name)
            axis.plot(
                epochs,
                [row[f"train_{metric}"] for row in rows],
                color=line.get_color(),
                linestyle=":",
            )
        axis.set_title(f"{metric} (nats)" if metric == "loss" else metric)
        axis.set_xlabel("epoch; dotted: training")
        axis.grid(alpha=0.3)
        axis.legend()
    return figure
