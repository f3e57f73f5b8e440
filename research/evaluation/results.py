"""The result of evaluating one checkpoint on one split, as text and JSON."""

from __future__ import annotations

import abc
import dataclasses
import json
from collections.abc import Sequence
from typing import Any, ClassVar

from research.evaluation.scores import ConfidenceInterval, Figure
from research.runs.console import short_path

RULE = "-" * 40
MAX_PRINTED_CLASSES = 40


@dataclasses.dataclass(frozen=True)
class Scores(abc.ABC):
    """The metrics of predictions for one kind of labels.

    Attributes:
      headline: name of the figure that stands beside the loss in tables.
      figures: metrics over all photos by name, with `loss` and the headline.
      classes: dataclasses with the metrics of each class.
      decisions: a dataclass with what was fitted on validation photos; None if there were none.
    """

    headline: ClassVar[str]

    figures: dict[str, Figure]
    classes: Sequence[Any]
    decisions: Any

    @abc.abstractmethod
    def title(self, name: str) -> str:
        """Returns the name of a figure for people, of at most 34 characters."""

    @abc.abstractmethod
    def class_table(self) -> list[str]:
        """Returns the lines of a table of the classes, with a header."""

    @property
    def headline_value(self) -> float | None:
        """The value of the headline; None if it has none."""
        figure = self.figures.get(self.headline)
        return figure.value if figure else None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The metrics of one checkpoint on one split.

    Attributes:
      ckpt_dir: the run's folder.
      backbone: name of the backbone.
      checkpoint: path of the checkpoint without its file extension.
      step: number of updates before the checkpoint.
      data: the data set or folder.
      split: name of the split.
      image_size: height and width of the input in pixels.
      mirror_averaging: whether the logits are means over each photo and its mirror image.
      photos: number of evaluated photos.
      damaged: number of photos that could not be decoded; no metric includes them.
      leaked: number of evaluated photos that the run was trained on (`train`) and validated on
        (`validation`), although they are of another split or folder; without those that are 0.
      scores: the metrics.
      task_figures: loss and metrics of a task in the user's own file, by name.
      predictions: the predictions for all photos.
    """

    ckpt_dir: str
    backbone: str
    checkpoint: str
    step: int
    data: str
    split: str
    image_size: int
    mirror_averaging: bool
    photos: int
    damaged: int
    leaked: dict[str, int]
    scores: Scores
    task_figures: dict[str, Figure]
    predictions: Any

    @property
    def figures(self) -> dict[str, Figure]:
        """All metrics over all photos, by name."""
        return {**self.scores.figures, **self.task_figures}

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their labels."""
        return tuple(one.name for one in self.scores.classes)

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        return self.figures["loss"].value

    def to_json(self) -> str:
        """Returns all fields but the predictions as a JSON object, each metric under its name."""
        fields: dict[str, Any] = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("scores", "task_figures", "predictions")
        }
        figures = {name: dataclasses.asdict(figure) for name, figure in self.figures.items()}
        scores = dataclasses.asdict(self.scores)
        del scores["figures"]
        return json.dumps({**fields, **figures, **scores}, indent=2) + "\n"

    def __str__(self) -> str:
        mirrored = ", mean of photo and mirror image" if self.mirror_averaging else ""
        headline, value = self.scores.title(self.scores.headline), self.scores.headline_value
        return "\n".join(
            [
                self.backbone,
                RULE,
                f"Loss: {self.loss:.2f}",
                f"{headline.capitalize()}: {'-' if value is None else f'{value:.2f}'}",
                RULE,
                f"{self.photos:,} photos of {self.data}, {self.split} split",
                *self._leak_notes(),
                f"input size: {self.image_size} x {self.image_size} pixels{mirrored}",
                f"checkpoint after step {self.step:,}: {short_path(self.checkpoint)}",
                "",
                *self._overall_table(),
                "",
                *self.scores.class_table(),
            ]
        )

    def _leak_notes(self) -> list[str]:
        used = {"train": "trained", "validation": "validated"}
        return [
            f"note: {count:,} of these {self.photos:,} photos were {used[split]} on"
            for split, count in self.leaked.items()
        ]

    def _overall_table(self) -> list[str]:
        lines = [f"{'':<34}{'value':>8}   95 % interval"]
        for name, figure in self.figures.items():
            title = self.scores.title(name)
            interval = interval_text(figure.interval)
            lines.append(f"{title:<34}{figure.value:>8.4f}   {interval}".rstrip())
        return lines


def interval_text(interval: ConfidenceInterval | None) -> str:
    """Returns an interval as text; an empty string for None."""
    return f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else ""


def short_text(figure: Figure | None) -> str:
    """Returns a value with its interval in two decimal places; `-` for None."""
    if figure is None:
        return "-"
    low_high = figure.interval
    return f"{figure.value:.2f}" + (f" ({low_high[0]:.2f}-{low_high[1]:.2f})" if low_high else "")


def limited(lines: Sequence[str], scores: Sequence[float], score: str) -> list[str]:
    """Returns the lines of a table, of the worst classes only if there are more than 40.

    Args:
      lines: the header, and a line for each class.
      scores: a number for each class, lower for worse classes.
      score: the name of these numbers.
    """
    header, *rows = lines
    if len(rows) <= MAX_PRINTED_CLASSES:
        return [*lines]
    worst = sorted(range(len(rows)), key=scores.__getitem__)[:MAX_PRINTED_CLASSES]
    left_out = len(rows) - len(worst)
    return [
        header,
        *(rows[index] for index in worst),
        f"... and {left_out:,} more classes, whose {score} is not lower",
    ]
