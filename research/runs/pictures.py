"""Pictures of runs: the grid of raw photos, and what training did by epoch."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from research.training.sweep import Sweep


def plain(text: str, longest: int | None = None) -> str:
    """Returns a name as pictures can show it: no formula, in one line, its end if it is long."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    return shown if longest is None or len(shown) <= longest else f"...{shown[3 - longest :]}"


def no_formula(text: str) -> str:
    """Returns what matplotlib shows as this text: dollars begin formulas, lines would be hidden."""
    escaped = text.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def photo_grid(photos: Sequence[tuple[np.ndarray, str]], columns: int = 5) -> Figure:
    """Draws photos in a grid, each below its title.

    Args:
      photos: pairs of uint8 RGB (height, width, 3), of any size, and title, of two or three lines.
      columns: photos a row.
    """
    rows = max(1, math.ceil(len(photos) / columns))
    lines = max((title.count("\n") + 1 for _, title in photos), default=1)
    side, of_title = 2.2, 0.1 + 0.16 * lines  # inches of a photo, and of its title above it
    width, height = side * columns, (side + of_title) * rows
    figure = Figure(figsize=(width, height))
    # One pair of axes in inches: a pair for each photo takes most of a second for twenty.
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    for index, (photo, title) in enumerate(photos):
        row, column = divmod(index, columns)
        across, up = (column + 0.5) * side, height - row * (side + of_title) - of_title - side / 2
        inches = 0.92 * side / max(photo.shape[:2])
        half_height, half_width = (inches * pixels / 2 for pixels in photo.shape[:2])
        extent = (across - half_width, across + half_width, up - half_height, up + half_height)
        axis.imshow(photo, extent=extent, aspect="auto")
        # File names may hold dollar signs, which are no formulas.
        axis.text(
            *(across, up + half_height + 0.06, title),
            fontsize=9,
            horizontalalignment="center",
            verticalalignment="bottom",
            parse_math=False,
        )
    axis.set(xlim=(0, width), ylim=(0, height))
    return figure


def main_figure(figures: Iterable[str]) -> str | None:
    """Returns the figure to show beside the loss, by its name: accuracy, or else the first."""
    names = [name for name in figures if name != "loss"]
    return "accuracy" if "accuracy" in names else next(iter(names), None)


def metrics_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns what is drawn of rows of metrics.jsonl: the loss and the main figure of the first."""
    names = (name for row in rows[:1] for name in row if name.startswith("validation_"))
    main = main_figure(name.removeprefix("validation_") for name in names)
    return ["loss", *([main] if main else [])]


def history(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draws loss and main figure of training and validation by epoch, from metrics.jsonl."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    metrics = metrics_of(rows)
    for axis, metric in zip(
        figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True
    ):
        for split in ("train", "validation"):
            values = [row.get(f"{split}_{metric}", math.nan) for row in rows]
            axis.plot(epochs, values, marker="o", markersize=3, label=split)
        axis.set_title(f"{metric} (nats)" if metric == "loss" else metric)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend()
    return figure


def learning_curves(runs: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> Figure:
    """Draws loss and main figure of several runs by epoch, from metrics.jsonl."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    metrics = metrics_of([row for _, rows in runs for row in rows])
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axis, metric in zip(axes, metrics, strict=True):
        for name, rows in runs:
            epochs = [row["epoch"] for row in rows]
            values = {
                split: [row.get(f"{split}_{metric}", math.nan) for row in rows]
                for split in ("validation", "train")
            }
            (line,) = axis.plot(
                epochs,
                values["validation"],
                marker="o",
                markersize=3,
                label=no_formula(plain(name, 60)),
            )
            colour = line.get_color()
            axis.plot(epochs, values["train"], color=colour, linestyle=":", alpha=0.8)
        axis.set_title(f"{metric} (nats)" if metric == "loss" else metric)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    figure.legend(
        handles=axes[0].lines[::2],
        title="validation; training dotted",
        loc="outside lower center",
        ncols=1 if len(runs) < 4 else 2,
        fontsize=9,
    )
    return figure


def learning_rates(sweeps: Sequence[Sweep]) -> Figure:
    """Draws the loss over the learning rate of each group, and marks what is suggested."""
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


def png(figure: Figure) -> bytes:
    """Returns a figure as the content of a PNG file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks: a box stands for each
        figure.savefig(buffer, format="png", dpi=100, pil_kwargs={"compress_level": 1})
    return buffer.getvalue()
