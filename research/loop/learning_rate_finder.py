"""Suggests learning rates: trains a little while the rate rises, and looks where the loss falls."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from research.data.batches import Batch
from research.data.order import share_out
from research.loop.builder import build_group
from research.loop.learner import Learner
from research.loop.preparation import Run
from research.optimization.schedules import Rising
from research.runs import console, pictures
from research.runs.durable_files import write_file

LOWEST_RATE, HIGHEST_RATE, STEPS = 1e-7, 10.0, 100
MEMORY = 0.9  # the share of itself that the smoothed loss keeps in a step
UNSETTLED = 10  # steps in which the average is of few losses
FEWEST = UNSETTLED + 3  # steps that a suggestion needs
DIVERGED = 4.0  # times the least loss so far


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The training losses of a group of variables while its learning rate rose.

    Attributes:
      group: its name, as people see it.
      rates: the learning rates.
      losses: the training loss at each, in nats, smoothed.
      suggestion: where the loss falls fastest; None if it never falls.
    """

    group: str
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    suggestion: float | None

    @property
    def why_none(self) -> str:
        """Why there is no suggestion, in a few words."""
        if len(self.rates) < FEWEST:
            return f"as the loss rose far or became infinite within {len(self.rates) + 1} steps"
        return "as the loss does not fall"


def suggest_learning_rates(run: Run, picture: Path) -> None:
    """Finds learning rates, prints them, and draws the sweeps.

    Raises:
      UserError: the picture cannot be written.
    """
    sweeps = find_learning_rates(run)
    write_file(picture, pictures.png(pictures.learning_rates(sweeps)))
    print(console.suggestions(sweeps, picture), flush=True)


def find_learning_rates(run: Run) -> list[Sweep]:
    """Sweeps the learning rate of each group, starting from the same weights.

    One group is trained at a time; the head has its initial weights while the others are trained.

    Args:
      run: to find rates for; its own rates and schedules do not matter.
    """
    config, network, state, strategy = run.config, run.built.network, run.state, run.team.strategy

    def endless() -> Iterator[Batch]:
        for epoch in itertools.count():
            epoch_batches = functools.partial(run.loader.epoch_batches, epoch, 0)
            yield from share_out(epoch_batches, strategy, config.accumulate_steps)

    batches = endless()
    sweeps = []
    for group in run.groups:
        before = [variable.numpy() for variable in network.model.variables]
        rising = Rising(LOWEST_RATE, HIGHEST_RATE, state.current_step, state.current_step + STEPS)
        with strategy.scope():
            alone = build_group(config, group.name, group.variables, rising, state.step)
        learner = Learner(strategy, run.task, network, (alone,), state, run.options)
        sweeps.append(sweep_rates(learner, rising, batches))
        for variable, value in zip(network.model.variables, before, strict=True):
            variable.assign(value)
    return sweeps


def sweep_rates(learner: Learner, rising: Rising, batches: Iterator[Batch]) -> Sweep:
    """Trains the learner's first group while its rate rises, until the loss has risen far."""
    rates: list[float] = []
    losses: list[float] = []
    for step in range(rising.first_step, rising.last_step):
        learner.state.tally.reset()
        learner.train_steps(batches, 1)
        sums = learner.state.tally.read()
        if not sums["weight"]:  # the gradients overflowed in float16: the step was skipped
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
    suggestion = suggest_rate(rates, smoothed or [0.0])
    return Sweep(learner.groups[0].title, tuple(rates), smoothed, suggestion)


def smooth(losses: Sequence[float]) -> tuple[float, ...]:
    """Returns an exponential moving average, with the bias correction of Adam."""
    smoothed, average = [], 0.0
    for count, loss in enumerate(losses, start=1):
        average = MEMORY * average + (1 - MEMORY) * loss
        smoothed.append(average / (1 - MEMORY**count))
    return tuple(smoothed)


def suggest_rate(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """Returns the rate at which the loss falls fastest (Smith 2017, arXiv 1506.01186).

    Args:
      rates: rising geometrically.
      losses: smoothed, one for each rate.

    Returns:
      None if the loss does not fall.
    """
    if len(losses) < FEWEST:
        return None
    settled, among = np.asarray(losses[UNSETTLED:]), rates[UNSETTLED:]
    lowest = int(np.argmin(settled))
    if lowest < 2 or settled[lowest] >= settled[0]:
        return None
    slopes = np.gradient(settled, np.log(np.asarray(among)))
    return float(among[int(np.argmin(slopes[: lowest + 1]))])
