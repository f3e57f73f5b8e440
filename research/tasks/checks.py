"""Finds the task of a setting, and checks the results of its methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf

from research.system.errors import UserError, first_line, one_line
from research.system.python_file import is_python_reference, load_from_file
from research.tasks.metrics import Means, mean_metrics
from research.tasks.multi_label import MultiLabel
from research.tasks.task import Gradients, Task

TASKS: Mapping[str, type[Task]] = {"classification": Task, "multi_label": MultiLabel}
RESERVED = ("loss", "weight", "photos")
EXAMPLES = 3  # dummy examples; 2 could be confused with the logits of two classes


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
    """Computes losses and metrics of some dummy examples, and returns the shapes of their sums.

    Args:
      task: the task to check.
      logits: number of logits that the head returns for one example.
      batch: the specs of the tensors of a batch, by name.

    Raises:
      UserError: the losses, metrics or figures have a wrong shape, type or name.
    """
    examples = {
        name: tf.zeros((EXAMPLES, *spec.shape[1:]), spec.dtype)
        for name, spec in batch.items()
        if name not in ("image", "mirrored")
    }
    examples["weight"] = tf.ones(EXAMPLES)
    zeros = tf.zeros((EXAMPLES, logits))
    kind = type(task).__name__
    several = examples["label"].shape.rank > 1 and not isinstance(task, MultiLabel)

    @tf.function(autograph=False)  # as in training: a Python condition cannot depend on a tensor
    def compute() -> dict[str, tf.Tensor]:
        metrics = task.metrics(zeros, examples)
        _check_metrics(f"{kind}.metrics", metrics)
        losses = task.losses(zeros, examples)
        _check_losses(f"{kind}.losses", losses)
        return {"loss": losses, **metrics}

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
    # A shape may only be known now.
    _check_losses(f"{kind}.losses", values["loss"])
    _check_metrics(f"{kind}.metrics", {key: one for key, one in values.items() if key != "loss"})
    label = examples["label"].dtype
    if label.is_floating and {"accuracy", "cross_entropy"} <= values.keys():
        raise UserError(
            f"{kind}.metrics returns the accuracy and the cross-entropy of classes, but labels are "
            f"{label.name}; return other metrics, without super().metrics"
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


def check_gradients(
    task: Task, found: object, variables: Sequence[keras.Variable], names: Sequence[str]
) -> None:
    """Raises `UserError` unless `Task.gradients` returned a gradient per variable, and all sums.

    Args:
      task: the task.
      found: what its `gradients` returned.
      variables: the variables that it was called with.
      names: the names of the sums.
    """
    method = f"{type(task).__name__}.gradients"
    if not isinstance(found, Gradients):
        raise UserError(f"{method} returns {found!r:.200}; expected an object of Gradients")
    values, sums = found
    is_list = isinstance(values, (list, tuple))
    if not is_list or len(values) != len(variables):
        given = f"{len(values)} gradients" if is_list else f"{values!r:.200} as gradients"
        raise UserError(
            f"{method} returns {given} for {len(variables)} variables; expected a list with a "
            "gradient for each of them"
        )
    for variable, value in zip(variables, values, strict=True):
        if not isinstance(value, tf.Tensor) or not value.shape.is_compatible_with(variable.shape):
            raise UserError(
                f"{method} returns {_described(value)} for the variable {variable.path}; expected "
                f"a dense tensor of shape {variable.shape}, of zeros if the loss does not depend "
                "on it"
            )
    is_dict = isinstance(sums, dict)
    if not is_dict or not set(names) <= sums.keys():
        given = ", ".join(map(str, sums)) if is_dict else f"{sums!r:.200}"
        raise UserError(
            f"{method} returns the sums {given}; expected {', '.join(names)}, as self.sums returns"
        )


def _check_losses(method: str, losses: object) -> None:
    """Raises `UserError` unless losses are one float32 for each example."""
    if not _is_value(losses) or losses.shape.rank != 1:  # type: ignore[attr-defined]
        raise UserError(
            f"{method} returns {_described(losses)} for {EXAMPLES} examples; expected one loss for "
            f"each: float32 of shape ({EXAMPLES},)"
        )


def _check_metrics(method: str, metrics: object) -> None:
    """Raises `UserError` unless metrics are values of each example by name."""
    if not isinstance(metrics, Mapping):
        raise UserError(f"{method} returns {metrics!r:.200}; expected a dictionary")
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise UserError(f"{method} returns the name {name!r}; expected a string")
        if name in RESERVED:
            raise UserError(f"{method} returns the reserved name {name!r}; rename it")
        if not _is_value(tf.constant(value) if isinstance(value, np.ndarray) else value):
            raise UserError(
                f"{method} returns {name!r} as {_described(value)} for {EXAMPLES} examples; "
                f"expected float32 of shape ({EXAMPLES}, ...)"
            )


def _is_value(value: object) -> bool:
    """Returns whether something is a tensor of float32 with a row for each example."""
    if not isinstance(value, tf.Tensor) or value.dtype != tf.float32 or not value.shape.rank:
        return False
    return value.shape[0] in (EXAMPLES, None)


def _described(value: object) -> str:
    if isinstance(value, tf.Tensor):
        return f"a tensor of {value.dtype.name} and shape {value.shape}"
    return f"{value!r:.200}"
