"""Compares the rows of the ablation with the default: summaries, a table and a plot."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from benchmarks.ablation_rows import EVALUATIONS, REMOVED, ROWS, key_of, title_of


class Difference(NamedTuple):
    """How much a row differs from the default on the same folds.

    Attributes:
      mean: over the folds.
      error: its standard error; NaN of one fold.
      probability: the p-value of the test that there is no difference; NaN of one fold.
    """

    mean: float
    error: float
    probability: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """A row of the table.

    Attributes:
      row: its name.
      runs: how many it is made of.
      accuracy: mean over the runs, and its standard error.
      log_loss: the same, in nats.
      accuracy_difference: to `default` on the same folds.
      log_loss_difference: the same.
      core_seconds: of training, of all cores together: the least of the runs, as what else a
        machine does only adds to it.
    """

    row: str
    runs: int
    accuracy: tuple[float, float]
    log_loss: tuple[float, float]
    accuracy_difference: Difference
    log_loss_difference: Difference
    core_seconds: float


def summarize(runs: list[dict[str, Any]], folds: int) -> list[Summary]:
    """Compares each row with `default` on the folds that both have."""
    found: dict[str, dict[tuple[int, int], dict[str, float]]] = {}
    for run in runs:
        for name in EVALUATIONS:
            if key_of(name, "accuracy") in run:
                figures = {key: run[key_of(name, key)] for key in ("accuracy", "log_loss")}
                figures["core_seconds"] = run["core_seconds"]
                found.setdefault(title_of(run["row"], name), {})[run["seed"], run["fold"]] = figures
    default = found["default"]
    summaries = []
    for row in (title_of(row, name) for row in (*ROWS, *REMOVED) for name in EVALUATIONS):
        if row not in found:
            continue
        own = found[row]
        shared = sorted(own.keys() & default.keys())
        values = {
            key: np.array([figures[key] for figures in own.values()])
            for key in ("accuracy", "log_loss", "core_seconds")
        }
        differences = {
            key: np.array([own[place][key] - default[place][key] for place in shared])
            for key in ("accuracy", "log_loss")
        }
        summaries.append(
            Summary(
                row,
                len(own),
                mean_and_error(values["accuracy"]),
                mean_and_error(values["log_loss"]),
                paired_test(differences["accuracy"], folds),
                paired_test(differences["log_loss"], folds),
                float(values["core_seconds"].min()),
            )
        )
    return summaries


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Returns the mean and its standard error, as if the runs were independent; NaN of one."""
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(values.mean()), float(error)


def paired_test(differences: np.ndarray, folds: int) -> Difference:
    """Returns the mean of paired differences, tested by a corrected resampled t-test.

    Runs share training photos, so that they are not independent: the variance is multiplied by
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

    def measured(figure: tuple[float, float], scale: float, digits: int) -> str:
        mean, error = figure
        known = "" if np.isnan(error) else f" ± {scale * error:.{digits}f}"
        return f"{scale * mean:.{digits}f}{known}"

    def change(difference: Difference, scale: float, digits: int) -> str:
        mean, _, probability = difference
        small = "p < 0.01" if probability < 0.01 else f"p {probability:.2f}"
        known = "" if np.isnan(probability) else f" ({small})"
        return "" if np.isnan(mean) or one is summaries[0] else f"{scale * mean:+.{digits}f}{known}"

    lines = [
        "| | runs | accuracy, % | against default | log loss | against default | core seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in summaries:
        lines.append(
            f"| {one.row} | {one.runs} | {measured(one.accuracy, 100, 2)} | "
            f"{change(one.accuracy_difference, 100, 2)} | {measured(one.log_loss, 1, 4)} | "
            f"{change(one.log_loss_difference, 1, 4)} | {one.core_seconds:.0f} |"
        )
    return "\n".join(lines)


def plot(summaries: list[Summary], file: Path) -> None:
    """Draws how much each row differs from the default on the same folds, with standard errors."""
    others = [one for one in summaries if one.row != "default"]
    figure = Figure(figsize=(9, 1.2 + 0.28 * len(others)), layout="constrained")
    figure.suptitle("more than the default, on the same folds")
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(others), 0, -1)
    for axis, title, scale, found in (
        (left, "accuracy, points", 100, [one.accuracy_difference for one in others]),
        (right, "log loss, nats", 1, [one.log_loss_difference for one in others]),
    ):
        means = [scale * one.mean for one in found]
        errors = [scale * one.error for one in found]
        axis.errorbar(means, places, xerr=errors, fmt="o", capsize=3)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_title(title)
        axis.grid(alpha=0.3)
        axis.margins(y=0.02)
    names = [f"{one.row}, {one.runs} run{'s'[: one.runs > 1]}" for one in others]
    left.set_yticks(list(places), names)
    figure.savefig(file, dpi=100)
