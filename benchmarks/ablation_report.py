"""Compares the rows of the ablation with the default: summaries, a table and a plot."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from benchmarks.ablation_rows import EVALUATIONS, REMOVED, ROWS, key_of, title_of

# The scale and the digits with which figures are printed.
FORMATS = {"accuracy": (100, 2), "log_loss": (1, 4)}


class Difference(NamedTuple):
    """The difference of a row from the default on the same folds.

    Attributes:
      mean: over the folds.
      error: standard error of the mean; NaN for a single fold.
      probability: p-value of the test that there is no difference; NaN for a single fold.
    """

    mean: float
    error: float
    probability: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """A row of the table.

    Attributes:
      row: its name.
      runs: the number of runs.
      figures: mean and standard error of `accuracy` and `log_loss` (in nats), over the runs.
      differences: of `accuracy` and `log_loss` from those of `default` on the same folds.
      core_seconds: of training, summed over the cores. The minimum over the runs, since other load
        on the machine can only add to it.
    """

    row: str
    runs: int
    figures: dict[str, tuple[float, float]]
    differences: dict[str, Difference]
    core_seconds: float


def summarize(runs: list[dict[str, Any]], folds: int) -> list[Summary]:
    """Compares each row with `default` on the folds that both have."""
    found: dict[str, dict[tuple[int, int], dict[str, float]]] = {}
    for run in runs:
        for name in EVALUATIONS:
            if key_of(name, "accuracy") in run:
                figures = {key: run[key_of(name, key)] for key in FORMATS}
                figures["core_seconds"] = run["core_seconds"]
                found.setdefault(title_of(run["row"], name), {})[run["seed"], run["fold"]] = figures
    default = found["default"]
    summaries = []
    for row in (title_of(row, name) for row in (*ROWS, *REMOVED) for name in EVALUATIONS):
        if row not in found:
            continue
        own = found[row]
        shared = sorted(own.keys() & default.keys())
        means, differences = {}, {}
        for key in FORMATS:
            means[key] = mean_and_error(np.array([figures[key] for figures in own.values()]))
            changes = np.array([own[fold][key] - default[fold][key] for fold in shared])
            differences[key] = paired_test(changes, folds)
        core_seconds = min(figures["core_seconds"] for figures in own.values())
        summaries.append(Summary(row, len(own), means, differences, core_seconds))
    return summaries


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Returns the mean and its standard error for independent runs; NaN for a single run."""
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(values.mean()), float(error)


def paired_test(differences: np.ndarray, folds: int) -> Difference:
    """Returns the mean of paired differences, tested by a corrected resampled t-test.

    Runs share training photos and are therefore not independent: the variance is multiplied by
    1 / n + 1 / (folds - 1) instead of 1 / n (Nadeau and Bengio 2003, Machine Learning 52).
    """
    count = len(differences)
    deviation = differences.std(ddof=1) if count > 1 else 0.0
    if not deviation:
        return Difference(float(differences.mean()) if count else np.nan, np.nan, np.nan)
    error = deviation * np.sqrt(1 / count + 1 / (folds - 1))
    t = differences.mean() / error
    probability = 2 * stats.t.sf(abs(t), count - 1)
    return Difference(float(differences.mean()), float(error), float(probability))


def table(summaries: list[Summary]) -> str:
    """Returns the rows as a Markdown table."""
    lines = [
        "| | runs | accuracy, % | against default | log loss | against default | core seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in summaries:
        cells = [one.row, str(one.runs)]
        for key, (scale, digits) in FORMATS.items():
            mean, error = one.figures[key]
            spread = "" if np.isnan(error) else f" ± {scale * error:.{digits}f}"
            cells.append(f"{scale * mean:.{digits}f}{spread}")
            mean, _, p = one.differences[key]
            test = "" if np.isnan(p) else " (p < 0.01)" if p < 0.01 else f" (p {p:.2f})"
            empty = np.isnan(mean) or one is summaries[0]
            cells.append("" if empty else f"{scale * mean:+.{digits}f}{test}")
        lines.append(f"| {' | '.join(cells)} | {one.core_seconds:.0f} |")
    return "\n".join(lines)


def plot(summaries: list[Summary], file: Path) -> None:
    """Draws the difference of each row from the default on the same folds, with error bars."""
    others = [one for one in summaries if one.row != "default"]
    figure = Figure(figsize=(9, 1.2 + 0.28 * len(others)), layout="constrained")
    figure.suptitle("difference from the default on the same folds")
    axes = figure.subplots(1, 2, sharey=True)
    places = range(len(others), 0, -1)
    titles = ("accuracy, points", "log loss, nats")
    for axis, title, (key, (scale, _)) in zip(axes, titles, FORMATS.items(), strict=True):
        means = [scale * one.differences[key].mean for one in others]
        errors = [scale * one.differences[key].error for one in others]
        axis.errorbar(means, places, xerr=errors, fmt="o", capsize=3)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_title(title)
        axis.grid(alpha=0.3)
        axis.margins(y=0.02)
    names = [f"{one.row}, {one.runs} run{'s'[: one.runs > 1]}" for one in others]
    axes[0].set_yticks(list(places), names)
    figure.savefig(file, dpi=100)
