"""Finds the task of a setting, and checks the results of its methods before training."""

from __future__ import annotations

from collections.abc import Mapping

import tensorflow as tf

from research.system.errors import UserError, first_line, one_line
from research.system.python_file import is_python_reference, load_from_file
from research.tasks.metrics import Means, mean_metrics
from research.tasks.multi_label import MultiLabel
from research.tasks.task import Task

TASKS: Mapping[str, type[Task]] = {"classification": Task, "multi_label": MultiLabel}
RESERVED = ("loss", "weight", "photos")


def find_task(task: str) -> type[Task]:
    """Returns the class of a built-in task, or of a task in a Python file.

    Raises:
      UserError: the file cannot be imported or has no such subclass of `Task`.
    """
    if is_python_reference(task):
        return load_from_file("task", task, Task)
    return TASKS[task]


def sum_shapes(
    task: Task, logits: int, batch: Mapping[str, tf.TensorSpec]
) -> dict[str, tuple[int, ...]]:
    """Computes losses and metrics of two dummy examples, and returns the shapes of their sums.

    Args:
      task: the task to check.
      logits: number of logits that the head returns for one example.
      batch: the specs of the tensors of a batch, by name.

    Raises:
      UserError: the losses, metrics or figures have a wrong shape, type or name.
    """
    examples = {
        name: tf.zeros((2, *spec.shape[1:]), spec.dtype)
        for name, spec in batch.items()
        if name not in ("image", "mirrored")
    }
    examples["weight"] = tf.ones(2)
    zeros = tf.zeros((2, logits))
    kind = type(task).__name__
    several = examples["label"].shape.rank > 1 and not isinstance(task, MultiLabel)

    @tf.function(autograph=False)  # as in training: a Python condition cannot depend on a tensor
    def compute() -> dict[str, tf.Tensor]:
        metrics = task.metrics(zeros, examples)
        if not isinstance(metrics, Mapping):
            raise UserError(f"{kind}.metrics returns {metrics!r}; expected a dictionary")
        return {"loss": task.losses(zeros, examples), **metrics}

    try:
        values = compute()
    except (ValueError, tf.errors.InvalidArgumentError) as error:
        if not several:
            raise
        raise UserError(
            f"{kind} cannot be computed for labels of shape {examples['label'].shape[1:]} per "
            f"photo ({first_line(error)[:200]}); for several labels per photo, give "
            "--task=multi_label, or a subclass of MultiLabel"
        ) from error
    label = examples["label"].dtype
    if label.is_floating and {"accuracy", "cross_entropy"} <= values.keys():
        raise UserError(
            f"{kind}.metrics returns the accuracy and the cross-entropy of classes, but labels are "
            f"{label.name}; return other metrics, without super().metrics"
        )
    losses = values["loss"]
    if not isinstance(losses, tf.Tensor) or losses.shape != (2,):
        found = f"a tensor of shape {losses.shape}" if isinstance(losses, tf.Tensor) else losses
        raise UserError(
            f"{kind}.losses returns {found} for two examples; expected one loss for each: (2,)"
        )
    for name, value in values.items():
        if name in RESERVED and name != "loss":
            raise UserError(f"{kind}.metrics returns the reserved name {name!r}; rename it")
        if not value.shape.rank or value.shape[0] != 2 or value.dtype != tf.float32:
            raise UserError(
                f"{kind}.metrics returns {name!r} as {value.dtype.name} of shape {value.shape} for "
                "two examples; expected float32 of shape (2, ...)"
            )
    sums = task.sums(zeros, examples)
    read = {name: value.numpy() for name, value in sums.items()}

    def figures_of(means: Means) -> Mapping[str, float]:
        found = task.figures(means)
        for name in RESERVED:
            if name in found:
                raise UserError(f"{kind}.figures returns the reserved name {name!r}; rename it")
        return found

    try:
        figures = mean_metrics(read, figures_of)
    except TypeError as error:
        raise UserError(
            f"{kind}.figures cannot be computed ({one_line(error)}); expected floats: remove means "
            "that are not single numbers before you call super().figures"
        ) from error
    for name, figure in figures.values.items():
        if not isinstance(figure, float):
            raise UserError(
                f"{kind}.figures returns {name!r} as {type(figure).__name__}; expected a float"
            )
    return {name: tuple(value.shape) for name, value in sums.items()}
