"""Compares the rows of the ablation with the default: on a task and over tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from benchmarks.ablation_rows import EVALUATIONS, FIT_ROWS, ROWS, key_of, title_of

# The scale and the digits with which figures are printed.
FORMATS = {"accuracy": (100, 2), "log_loss": (1, 4)}
TITLES = [
    title_of(row, name)
    for row in (*ROWS, *FIT_ROWS)
    for name in (EVALUATIONS if row in ROWS else [""])
]
Figures = dict[str, dict[tuple[int, int], dict[str, float]]]  # by title, then by seed and fold


class Difference(NamedTuple):
    """The difference of a row from the default on the same folds.

    Attributes:
      mean: over the folds.
      error: standard error of the mean; NaN for a single fold.
      probability: p-value of the test that there is no difference; NaN for a single fold.
      freedom: degrees of freedom of the error.
    """

    mean: float
    error: float
    probability: float
    freedom: float = 1.0

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the difference; NaN for a single fold."""
        width = self.error * float(stats.t.ppf(0.975, self.freedom))
        return self.mean - width, self.mean + width


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


def figures_of(runs: Sequence[Mapping[str, Any]]) -> Figures:
    """Returns the figures of the runs of one task, by title, seed and fold.

    The core seconds of runs that found a trunk cache of others are infinite.
    """
    found: Figures = {}
    for run in runs:
        for name in EVALUATIONS:
            if key_of(name, "accuracy") in run:
                figures = {key: run[key_of(name, key)] for key in FORMATS}
                figures["core_seconds"] = np.inf if run.get("found_cache") else run["core_seconds"]
                found.setdefault(title_of(run["row"], name), {})[run["seed"], run["fold"]] = figures
    return found


def summarize(runs: Sequence[Mapping[str, Any]], folds: int) -> list[Summary]:
    """Compares each row with `default` on the folds of one task that both have."""
    found = figures_of(runs)
    default = found.get("default", {})
    summaries = []
    for row in TITLES:
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


@dataclasses.dataclass(frozen=True)
class Overall:
    """A row compared with the default over several tasks.

    Attributes:
      row: its name.
      tasks: the differences of `accuracy` and of the logarithm of `log_loss`, by task. Log losses
        of tasks differ by factors, so that their ratios are compared.
    """

    row: str
    tasks: dict[str, dict[str, Difference]]

    def mean(self, key: str) -> Difference:
        """Returns the mean over the tasks, each with the same weight."""
        return mean_over_tasks([of_task[key] for of_task in self.tasks.values()])

    def worst(self, key: str) -> tuple[str, Difference]:
        """Returns the task with the lowest accuracy, or highest log loss, against the default."""
        sign = 1 if key == "accuracy" else -1
        name = min(self.tasks, key=lambda task: sign * self.tasks[task][key].mean)
        return name, self.tasks[name][key]


def over_tasks(
    runs: Sequence[Mapping[str, Any]], tasks: Sequence[str], folds: int
) -> list[Overall]:
    """Compares each row with `default` on the tasks and folds that both have.

    Rows that lack a task are compared on their tasks; rows with one task are left out.
    """
    found = {task: figures_of([run for run in runs if run["task"] == task]) for task in tasks}
    rows = []
    for title in TITLES:
        of_tasks: dict[str, dict[str, Difference]] = {}
        for task, figures in found.items():
            own, default = figures.get(title, {}), figures.get("default", {})
            shared = sorted(own.keys() & default.keys())
            if not shared or title == "default":
                continue
            of_tasks[task] = {
                key: paired_test(
                    np.array([scaled(own[at][key]) - scaled(default[at][key]) for at in shared]),
                    folds,
                )
                for key, scaled in (("accuracy", float), ("log_loss", np.log))
            }
        if len(of_tasks) > 1:
            rows.append(Overall(title, of_tasks))
    return rows


def mean_over_tasks(differences: Sequence[Difference]) -> Difference:
    """Returns the mean of independent differences, with Satterthwaite's degrees of freedom.

    The interval says how certain the mean over these tasks is, not that over other tasks.
    """
    mean = float(np.mean([one.mean for one in differences]))
    squares = np.array([one.error**2 for one in differences])
    total = float(squares.sum())
    if not total > 0:  # NaN, because a task has a single fold, or no difference at all
        return Difference(mean, np.nan, np.nan)
    error = np.sqrt(total) / len(differences)
    freedom = total**2 / sum(
        square**2 / one.freedom for square, one in zip(squares, differences, strict=True)
    )
    probability = 2 * stats.t.sf(abs(mean / error), freedom)
    return Difference(mean, float(error), float(probability), float(freedom))


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
    return Difference(float(differences.mean()), float(error), float(probability), count - 1)


def report(runs: Sequence[Mapping[str, Any]], tasks: Sequence[str], folds: int) -> str:
    """Returns a Markdown table of the rows over several tasks, and a table per task."""
    parts = [overall_table(over_tasks(runs, tasks, folds))] if len(tasks) > 1 else []
    for task in tasks:
        summaries = summarize([run for run in runs if run["task"] == task], folds)
        parts.append(f"**{task}**\n\n{table(summaries)}")
    return "\n\n".join(parts)


def overall_table(rows: Sequence[Overall]) -> str:
    """Returns rows compared over tasks as a Markdown table, with 95 % intervals."""
    columns = ("accuracy, points", "worst task", "log loss, %", "worst task")
    lines = [f"| against default | tasks | {' | '.join(columns)} |", "| --- " * 6 + "|"]
    for row in rows:
        cells = [row.row, str(len(row.tasks))]
        for key in FORMATS:
            task, worst = row.worst(key)
            cells += [difference_text(key, row.mean(key))]
            cells += [f"{task} {difference_text(key, worst)}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def difference_text(key: str, difference: Difference) -> str:
    """Returns a difference and its interval, in bold if the interval excludes 0.

    Args:
      key: `accuracy`, shown in points, or `log_loss`, a logarithm that is shown in percent.
      difference: from the default.
    """
    values = np.array([difference.mean, *difference.interval])
    mean, low, high = 100 * (values if key == "accuracy" else np.expm1(values))
    digits = 2 if key == "accuracy" else 0
    if np.isnan(low):
        return f"{mean:+.{digits}f}"
    text = f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
    return f"**{text}**" if low * high > 0 else text


def table(summaries: Sequence[Summary]) -> str:
    """Returns the rows of one task as a Markdown table."""
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
            mean, p = one.differences[key].mean, one.differences[key].probability
            test = "" if np.isnan(p) else " (p < 0.01)" if p < 0.01 else f" (p {p:.2f})"
            empty = np.isnan(mean) or one.row == "default"
            cells.append("" if empty else f"{scale * mean:+.{digits}f}{test}")
        cells.append(f"{one.core_seconds:.0f}" if np.isfinite(one.core_seconds) else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
