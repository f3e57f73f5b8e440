"""Several evaluations side by side, with paired differences to the first on the same photos."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from research.evaluation.intervals import percentiles, resampled_rows
from research.evaluation.results import Evaluation, interval_text
from research.evaluation.scores import Figure, Predictions
from research.runs.console import short_path

WIDTH_OF_NAMES = 43


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much greater figures of some predictions are than those of others, photo by photo."""

    accuracy: Figure
    loss: Figure


def difference(one: Predictions, other: Predictions, resamples: int) -> Difference | None:
    """Compares two predictions, in whichever order their photos are; None if of other photos.

    Each resample draws the same photos for both, so that what is hard about a photo cancels out.
    """
    ordered = [_by_name(predictions) for predictions in (one, other)]
    if ordered[0].names != ordered[1].names or (ordered[0].labels != ordered[1].labels).any():
        return None
    gains = ordered[0].correct.astype(float) - ordered[1].correct
    losses = ordered[0].losses() - ordered[1].losses()
    rows = resampled_rows(len(losses), resamples)
    accuracy, loss = (
        Figure(float(values.mean()), percentiles([float(values[drawn].mean()) for drawn in rows]))
        for values in (gains, losses)
    )
    return Difference(accuracy, loss)


def _by_name(predictions: Predictions) -> Predictions:
    """Returns the same predictions in the order of the photos' names."""
    names = predictions.names
    rows = np.array(sorted(range(len(names)), key=names.__getitem__), int)
    ordered = tuple(names[row] for row in rows)
    return Predictions(ordered, predictions.labels[rows], predictions.logits[rows])


def comparison_table(evaluations: Sequence[Evaluation], resamples: int) -> str:
    """Returns a line an evaluation, and below it its differences to the first one of its split."""
    lines = [f"{'':<{WIDTH_OF_NAMES + 1}}{'photos':>7}{'accuracy':>10}{'loss':>9}"]
    first: dict[tuple[str, str], Evaluation] = {}
    for evaluation in evaluations:
        *above, name = _title(evaluation)
        lines += above
        lines.append(
            f"{name:<{WIDTH_OF_NAMES + 1}}{evaluation.photos:>7,}"
            f"{evaluation.accuracy:>10.4f}{evaluation.loss:>9.4f}"
        )
        reference = first.setdefault((evaluation.data, evaluation.split), evaluation)
        if reference is evaluation:
            continue
        found = difference(evaluation.predictions, reference.predictions, resamples)
        if found is None:
            lines.append("  of other photos than the first: not compared")
            continue
        for title, figure in (("accuracy", found.accuracy), ("loss", found.loss)):
            interval = interval_text(figure.interval)
            lines.append(
                f"  {title} against the first: {figure.value:+.4f}"
                f"{f' (95 % interval {interval})' if interval else ''}"
            )
    return "\n".join(lines)


def _title(evaluation: Evaluation) -> list[str]:
    """Returns what was evaluated in a line, or in two where it does not fit the column."""
    run = short_path(evaluation.ckpt_dir)
    checkpoint = Path(evaluation.checkpoint)
    rest = f"{checkpoint.parent.name}/{checkpoint.name}, {evaluation.split}"
    whole = f"{run}, {rest}"
    if len(whole) <= WIDTH_OF_NAMES:
        return [whole]
    return [run if len(run) < 80 else f"...{run[-76:]}", f"  {rest}"]
