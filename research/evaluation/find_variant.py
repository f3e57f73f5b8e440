"""Chooses the variant of the evaluation for a task."""

from __future__ import annotations

from typing import Any

from research.evaluation.multi_label import MultiLabel
from research.evaluation.single_label import SingleLabel
from research.evaluation.variant import Variant
from research.tasks.multi_label import has_several_labels
from research.tasks.task import Task


def variant_of(task: type[Task]) -> type[Variant[Any, Any]]:
    """Returns the variant for a task class, also for a subclass in the user's own file."""
    return MultiLabel if has_several_labels(task) else SingleLabel
