"""Draws the pictures of a run: a grid of photos, learning curves and learning rates."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from research.data.source import classes_of

if TYPE_CHECKING:
    from research.loop.learning_rate_finder import Sweep

# The user's matplotlibrc may need fonts, LaTeX or a display.
DEFAULT_STYLE = matplotlib.style.context("default")


def plain(text: str, longest: int | None = None) -> str:
    """Replaces unprintable characters in a name by `?`, and keeps at most its last characters."""
    shown = "".join(character if character.isprintable() else "?" for character in text)
    return shown if longest is None or len(shown) <= longest else f"...{shown[3 - longest :]}"


def label_title(class_names: Sequence[str], label: Any) -> str:
    """Returns the class names of a label, or the label itself if it names no classes.

    Args:
      class_names: by label.
      label: a class index, an array with a 0 or 1 per class, or another value of the source.
    """
    classes = classes_of(label, len(class_names))
    if classes is None:
        return str(label)
    if np.ndim(label) == 0:
        return class_names[classes[0]]
    return shortened([class_names[k] for k in classes]) if classes else "(no label)"


def shortened(names: Sequence[str], longest: int = 26) -> str:
    """Returns names in one line of at most `longest` characters: "cat, dog, +3" for five names."""
    for count in range(len(names), 0, -1):
        rest = [f"+{len(names) - count}"] if count < len(names) else []
        line = ", ".join([*map(plain, names[:count]), *rest])
        if len(line) <= longest:
            return line
    rest = [f"+{len(names) - 1}"] if len(names) > 1 else []
    return ", ".join([plain(names[0], longest - sum(len(one) + 2 for one in rest)), *rest])


def escape_formulas(text: str) -> str:
    """Escapes a label for matplotlib: `$` starts a formula, and a leading `_` hides the label."""
    escaped = text.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


@DEFAULT_STYLE
def photo_grid(photos: Sequence[tuple[np.ndarray, str]], columns: int = 5) -> Figure:
    """Draws photos in a grid, each below its title.

    Args:
      photos: pairs of a uint8 RGB photo, shape (height, width, 3), and a title of some lines.
      columns: number of photos per row.
    """
    rows = max(1, math.ceil(len(photos) / columns))
    lines = max((title.count("\n") + 1 for _, title in photos), default=1)
    side, title_height = 2.2, 0.1 + 0.16 * lines  # in inches
    width, height = side * columns, (side + title_height) * rows
    figure = Figure(figsize=(width, height))
    # All photos share one pair of axes, in inches: twenty pairs take most of a second.
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    for index, (photo, title) in enumerate(photos):
        row, column = divmod(index, columns)
        x = (column + 0.5) * side
        y = height - row * (side + title_height) - title_height - side / 2
        inches = 0.92 * side / max(photo.shape[:2])
        half_height, half_width = (inches * pixels / 2 for pixels in photo.shape[:2])
        extent = (x - half_width, x + half_width, y - half_height, y + half_height)
        axis.imshow(photo, extent=extent, aspect="auto")
        # A dollar sign in a file name must not start a formula.
        top = y + half_height + 0.06
        axis.text(x, top, title, fontsize=9, ha="center", va="bottom", parse_math=False)
    axis.set(xlim=(0, width), ylim=(0, height))
    return figure


def main_metric(names: Iterable[str]) -> str | None:
    """Returns the name of the metric to show beside the loss: accuracy, or else the first one."""
    metrics = [name for name in names if name != "loss"]
    return "accuracy" if "accuracy" in metrics else next(iter(metrics), None)


def _charts(figure: Figure, rows: Sequence[dict[str, Any]]) -> Iterator[tuple[Axes, str]]:
    """Yields axes with epochs and a metric's name, for the loss and the first row's main metric."""
    names = (name for row in rows[:1] for name in row if name.startswith("train_"))
    main = main_metric(name.removeprefix("train_") for name in names)
    metrics = ["loss", *([main] if main else [])]
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axis, metric in zip(axes, metrics, strict=True):
        yield axis, metric
        axis.set_title(f"{metric} (nats)" if metric == "loss" else metric.replace("_", " "))
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)


def _draw_curve(axis: Axes, rows: Sequence[dict[str, Any]], name: str, **style: Any) -> Line2D:
    found = [row.get(name) for row in rows]
    epochs, values = [row["epoch"] for row in rows], [math.nan if y is None else y for y in found]
    (line,) = axis.plot(epochs, values, **style)
    return line


@DEFAULT_STYLE
def history(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draws the loss and the main metric by epoch, from the rows of metrics.jsonl."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axis, metric in _charts(figure, rows):
        validates = any("validation_loss" in row for row in rows)
        for split in ("train", "validation") if validates else ("train",):
            _draw_curve(axis, rows, f"{split}_{metric}", marker="o", markersize=3, label=split)
        axis.legend()
    return figure


@DEFAULT_STYLE
def learning_curves(runs: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> Figure:
    """Draws the loss and the main metric of several runs by epoch.

    Args:
      runs: the name of each run, and the rows of its metrics.jsonl.
    """
    figure = Figure(figsize=(10, 5), layout="constrained")
    for axis, metric in _charts(figure, [row for _, rows in runs for row in rows]):
        for name, rows in runs:
            label = escape_formulas(plain(name, 60))
            line = _draw_curve(
                axis, rows, f"validation_{metric}", marker="o", markersize=3, label=label
            )
            colour = line.get_color()
            _draw_curve(axis, rows, f"train_{metric}", color=colour, linestyle=":", alpha=0.8)
    figure.legend(
        handles=figure.axes[0].lines[::2],
        title="validation; training dotted",
        loc="outside lower center",
        ncols=1 if len(runs) < 4 else 2,
        fontsize=9,
    )
    return figure


@DEFAULT_STYLE
def learning_rates(sweeps: Sequence[Sweep]) -> Figure:
    """Draws the loss by learning rate for each parameter group, and marks the suggested rate."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for sweep in sweeps:
        (line,) = axis.plot(sweep.rates, sweep.losses, label=sweep.group)
        if sweep.suggestion:
            loss = sweep.losses[sweep.rates.index(sweep.suggestion)]
            axis.plot(sweep.suggestion, loss, "o", color=line.get_color())
            axis.annotate(
                f"{sweep.suggestion:.1e}",
                (sweep.suggestion, loss),
                textcoords="offset points",
                xytext=(6, 6),
                color=line.get_color(),
            )
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    axis.set_ylabel("training loss (nats), smoothed")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


@DEFAULT_STYLE
def png(figure: Figure) -> bytes:
    """Returns a figure as the content of a PNG file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about characters that the font lacks
        figure.savefig(buffer, format="png", dpi=100, pil_kwargs={"compress_level": 1})
    return buffer.getvalue()
