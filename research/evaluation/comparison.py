"""Compares evaluations in a table, with paired differences on the same photos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research.evaluation.results import Evaluation, interval_text
from research.evaluation.scores import Figure, Resamples, percentiles
from research.evaluation.variant import P, Variant
from research.runs.console import SHORT_NAMES, short_path

NAME_WIDTH = 43


def difference(
    variant: Variant[P, Any], one: P, other: P, resamples: int
) -> dict[str, Figure] | None:
    """Returns metrics of one minus those of the other, paired by photo, by name.

    The photos may be in any order. Each resample draws the same photos for both, so that the
    difficulty of a photo cancels out.

    Returns:
      None if the photos or their labels are not the same.
    """
    one, other = _sorted_by_name(variant, one), _sorted_by_name(variant, other)
    if one.names != other.names or (one.labels != other.labels).any():
        return None
    found = variant.differences(one, other, Resamples(len(one), resamples))
    return {name: Figure(value, percentiles(drawn)) for name, (value, drawn) in found.items()}


def _sorted_by_name(variant: Variant[P, Any], predictions: P) -> P:
    rows = np.array(sorted(range(len(predictions)), key=predictions.names.__getitem__), int)
    names = tuple(sorted(predictions.names))
    return variant.predictions(names, predictions.labels[rows], predictions.logits[rows])


def comparison_table(
    variant: Variant[Any, Any], evaluations: Sequence[Evaluation], resamples: int
) -> str:
    """Returns one line per evaluation, with its differences from the first of the same split.

    All evaluations must be of the same variant.
    """
    headline = evaluations[0].scores.headline
    title = SHORT_NAMES.get(headline, headline)
    lines = [f"{'':<{NAME_WIDTH + 1}}{'photos':>7}{title:>10}{'loss':>9}"]
    first: dict[tuple[str, str], Evaluation] = {}
    for evaluation in evaluations:
        *above, name = _title(evaluation)
        lines += above
        value = evaluation.scores.headline_value
        shown = "-" if value is None else f"{value:.4f}"
        lines.append(
            f"{name:<{NAME_WIDTH + 1}}{evaluation.photos:>7,}{shown:>10}{evaluation.loss:>9.4f}"
        )
        reference = first.setdefault((evaluation.data, evaluation.split), evaluation)
        if reference is evaluation:
            continue
        if evaluation.class_names != reference.class_names:
            lines.append("  not compared with the first: the classes are not the same")
            continue
        found = difference(variant, evaluation.predictions, reference.predictions, resamples)
        if found is None:
            lines.append("  not compared with the first: the photos are not the same")
            continue
        for title, figure in found.items():
            interval = interval_text(figure.interval)
            lines.append(
                f"  {title} minus the first: {figure.value:+.4f}"
                f"{f' (95 % interval {interval})' if interval else ''}"
            )
    return "\n".join(lines)


def _title(evaluation: Evaluation) -> list[str]:
    """Returns run, checkpoint and split in one line, or in two if they do not fit the column."""
    run = short_path(evaluation.ckpt_dir)
    checkpoint = Path(evaluation.checkpoint)
    rest = f"{checkpoint.parent.name}/{checkpoint.name}, {evaluation.split}"
    whole = f"{run}, {rest}"
    if len(whole) <= NAME_WIDTH:
        return [whole]
    return [run if len(run) < 80 else f"...{run[-76:]}", f"  {rest}"]
