"""Suggests learning rates: trains a little while the rate rises, and looks where the loss falls."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import keras
import numpy as np
import tensorflow as tf

from research.data.batches import Batch, share_out
from research.data.loader import DataLoader
from research.optimization.schedules import Rising
from research.training.builder import build_group
from research.training.learner import Learner
from research.training.preparation import Run
from research.training.sweep import DIVERGED, Sweep, smooth, suggest_rate

LOWEST_RATE, HIGHEST_RATE, STEPS = 1e-7, 10.0, 100


def find_learning_rates(run: Run) -> list[Sweep]:
    """Sweeps the learning rate of each group, from the same weights each.

    A group is trained alone, the others stay as they are, the head with its initial weights.

    Args:
      run: to find rates for; its own rates and schedules do not matter.
    """
    config, network, state, strategy = run.config, run.built.network, run.state, run.team.strategy
    batches = _endless(run.loader, strategy, config.accumulate_steps)
    sweeps = []
    for group in run.groups:
        before = [variable.numpy() for variable in network.model.variables]
        rising = Rising(LOWEST_RATE, HIGHEST_RATE, state.current_step, STEPS)
        with strategy.scope():
            alone = build_group(config, group.name, group.variables, rising, state.step)
        learner = Learner(strategy, run.task, network, (alone,), state, run.options)
        sweeps.append(sweep_rates(learner, rising, batches))
        _restore(network.model, before)
    return sweeps


def sweep_rates(learner: Learner, rising: Rising, batches: Iterator[Batch]) -> Sweep:
    """Trains the learner's first group while its rate rises, until the loss has risen far."""
    rates: list[float] = []
    losses: list[float] = []
    for step in range(rising.first_step, rising.first_step + rising.steps):
        learner.state.tally.reset()
        learner.train_steps(batches, 1)
        sums = learner.state.tally.read()
        if not sums["weight"]:  # float16's gradients overflowed: nothing was learned from the batch
            continue
        loss = float(sums["loss"] / sums["weight"])
        if not math.isfinite(loss):
            break
        rates.append(float(rising(step)))
        losses.append(loss)
        smoothed = smooth(losses)
        if smoothed[-1] > DIVERGED * min(smoothed):
            break
    smoothed = smooth(losses)
    return Sweep(
        learner.groups[0].title, tuple(rates), smoothed, suggest_rate(rates, smoothed or [0.0])
    )


def _endless(photos: DataLoader, strategy: tf.distribute.Strategy, parts: int) -> Iterator[Batch]:
    """Yields training batches, epoch after epoch."""
    for epoch in itertools.count():
        yield from share_out(functools.partial(photos.epoch_batches, epoch, 0), strategy, parts)


def _restore(model: keras.Model, values: Sequence[np.ndarray]) -> None:
    for variable, value in zip(model.variables, values, strict=True):
        variable.assign(value)
