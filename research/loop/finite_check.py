"""Fetches scalars of training steps, and stops a run whose loss is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping

import tensorflow as tf

from research.loop.learner import Learner
from research.runs.logbook import Records
from research.system.errors import UserError


class TrainingDivergedError(UserError):
    """The loss or a gradient became infinite or NaN."""


def read_scalars(learner: Learner, step: int, scalars: Mapping[str, tf.Tensor]) -> dict[str, float]:
    """Fetches a step's scalars from the device, and adds its learning rates and the loss scale."""
    figures = {tag: float(value) for tag, value in scalars.items()}
    for group in learner.groups:
        if f"gradient_norm/{group.name}" in figures:
            figures[f"learning_rate/{group.name}"] = float(group.schedule(step - 1))
    loss_scale = learner.state.loss_scale
    if loss_scale.active:
        # Gradients may overflow in some steps, which the loss scale skips.
        figures = {tag: value for tag, value in figures.items() if math.isfinite(value)}
        scale, skipped_steps = loss_scale.read()
        figures["loss_scale"] = scale
        figures["skipped_steps"] = skipped_steps
    return figures


def check_finite(step: int, records: Records, values: Mapping[str, float]) -> None:
    """Raises `TrainingDivergedError` if a value is infinite or NaN, or the loss scale is below 1.

    Each overflow of the gradients halves the loss scale. Below 1, the scale is not their cause.
    """
    for name, value in values.items():
        if not math.isfinite(value) or (name == "loss_scale" and value < 1):
            last = records.last_checkpoint
            kept = f"the last good checkpoint is {last}" if last else "no checkpoint was written"
            raise TrainingDivergedError(
                f"the {name} became {value} by step {step}; training stopped, {kept}; try "
                "lower learning rates, a longer --warmup, or --precision=float32"
            )
