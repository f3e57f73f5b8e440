"""The plot of the metrics of all labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from research.evaluation.multi_label_scores import LabelFigures
from research.runs.photo_grid import plain
from research.runs.pictures import DEFAULT_STYLE, escape_formulas

MAX_BARS = 40
MAX_NAME_LENGTH = 26


@DEFAULT_STYLE
def class_bars(classes: Sequence[LabelFigures], has_thresholds: bool) -> Figure:
    """Draws the average precision of each class with its 95 % interval, and its F1.

    The best class is at the top. Above 40 classes, only the worst are drawn. Classes without photos
    are left out.

    Args:
      classes: the metrics of all classes.
      has_thresholds: whether F1 is at thresholds that were chosen, not at 0.5.
    """
    pairs = [(one, one.average_precision) for one in classes]
    known = [(one, area) for one, area in pairs if area is not None]
    known.sort(key=lambda pair: pair[1].value)
    drawn, left_out = known[:MAX_BARS], len(known) > MAX_BARS
    figure = Figure(figsize=(7.5, 1.6 + 0.3 * max(len(drawn), 3)), layout="constrained")
    axis = figure.subplots()
    places = np.arange(len(drawn))
    values = [area.value for _, area in drawn]
    axis.barh(places, values, color="C0", alpha=0.35, label="average precision")
    intervals = [area.interval or (area.value, area.value) for _, area in drawn]
    if intervals:
        low, high = np.array(intervals).T
        errors = np.maximum([np.array(values) - low, high - np.array(values)], 0.0)
        axis.errorbar(values, places, xerr=errors, fmt="none", ecolor="C0", elinewidth=1.2)
    f1 = [one.f1.value if one.f1 else np.nan for one, _ in drawn]
    title = "F1 at the chosen threshold" if has_thresholds else "F1 at a probability of 0.5"
    axis.plot(f1, places, "D", color="C1", markersize=5, label=title)
    axis.set_yticks(
        places,
        [
            f"{escape_formulas(plain(one.name, MAX_NAME_LENGTH))} ({one.photos:,})"
            for one, _ in drawn
        ],
    )
    axis.set(
        xlim=(-0.02, 1.02),
        ylim=(-0.7, max(len(drawn), 1) - 0.3),
        xlabel="score of each class (and number of its photos)",
    )
    axis.grid(axis="x", alpha=0.3)
    if left_out:
        axis.set_title(f"the {MAX_BARS} worst of {len(known)} classes")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure
