"""What is fetched from the device after some steps, and whether training can go on with it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import tensorflow as tf

from research.runs.logbook import Records
from research.system.errors import UserError
from research.training.learner import Learner


class TrainingDivergedError(UserError):
    """The loss or a gradient is no finite number any more."""


def read_scalars(learner: Learner, step: int, scalars: Mapping[str, tf.Tensor]) -> dict[str, float]:
    """Fetches a step's scalars from the device, with the learning rates they came about by."""
    figures = {tag: float(value) for tag, value in scalars.items()}
    for group in learner.groups:
        if f"gradient_norm/{group.name}" in figures:
            figures[f"learning_rate/{group.name}"] = float(group.schedule(step - 1))
    loss_scale = learner.state.loss_scale
    if loss_scale.active:
        # Gradients that overflow once in a while are what the scale is for.
        figures = {tag: value for tag, value in figures.items() if math.isfinite(value)}
        scale, skipped_steps = loss_scale.read()
        figures["loss_scale"] = scale
        figures["skipped_steps"] = skipped_steps
    return figures


def check_finite(step: int, logbook: Records, values: Mapping[str, float]) -> None:
    """Raises `TrainingDivergedError` where a value is infinite or NaN, or float16 no longer helps.

    A loss scale below 1 would only shrink what is small already: the loss itself is the trouble.
    """
    for name, value in values.items():
        if not math.isfinite(value) or (name == "loss_scale" and value < 1):
            last = logbook.last_checkpoint
            kept = f"the last good checkpoint is {last}" if last else "no checkpoint was written"
            raise TrainingDivergedError(
                f"the {name} became {value} by step {step}; training stopped, {kept}; try "
                "lower learning rates, a longer --warmup, or --precision=float32"
            )
