"""Draws learning curves and learning rates."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from research.runs.photo_grid import plain
from research.runs.run_directory import main_metric

if TYPE_CHECKING:
    from research.loop.learning_rate_finder import Sweep

# The user's matplotlibrc may need fonts, LaTeX or a display.
DEFAULT_STYLE = matplotlib.style.context("default")


def escape_formulas(text: str) -> str:
    """Escapes a label for matplotlib: `$` starts a formula, and a leading `_` hides the label."""
    escaped = text.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


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
