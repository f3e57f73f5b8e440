"""Several evaluations side by side, with paired differences to the first on the same photos."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from research.console import short_path
from research.evaluation import Evaluation, interval_text
from research.scores import Figure, percentiles, resampled_rows


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much greater figures of one evaluation are than those of another, photo by photo."""

    accuracy: Figure
    loss: Figure


def difference(one: Evaluation, other: Evaluation, resamples: int) -> Difference | None:
    """Compares two evaluations; None if they are not of the same photos.

    Each resample draws the same photos for both, so that what is hard about a photo cancels out.
    """
    if one.predictions.names != other.predictions.names:
        return None
    losses = one.predictions.losses() - other.predictions.losses()
    right = [
        evaluation.predictions.predicted == evaluation.predictions.labels
        for evaluation in (one, other)
    ]
    gains = right[0].astype(float) - right[1]
    rows = resampled_rows(len(losses), resamples)
    accuracy, loss = (
        Figure(float(values.mean()), percentiles([float(values[drawn].mean()) for drawn in rows]))
        for values in (gains, losses)
    )
    return Difference(accuracy, loss)


def comparison_table(evaluations: Sequence[Evaluation], resamples: int) -> str:
    """Returns a line an evaluation, and below it its differences to the first one of its split."""
    lines = [f"{'':<44}{'photos':>7}{'accuracy':>10}{'loss':>9}"]
    first: dict[tuple[str, str], Evaluation] = {}
    for evaluation in evaluations:
        name = f"{short_path(evaluation.checkpoint)}, {evaluation.split}"
        if len(name) > 43:
            lines.append(name)
            name = ""
        lines.append(
            f"{name:<44}{evaluation.photos:>7,}{evaluation.accuracy:>10.4f}{evaluation.loss:>9.4f}"
        )
        reference = first.setdefault((evaluation.data, evaluation.split), evaluation)
        if reference is evaluation:
            continue
        found = difference(evaluation, reference, resamples)
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
