"""Learning rate finder: trains with a rising rate and finds where the loss falls fastest."""

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
from research.runs import console
from research.runs.durable_files import write_file

LOWEST_RATE, HIGHEST_RATE, STEPS = 1e-7, 10.0, 100
SMOOTHING = 0.9  # decay of the moving average of the loss
IGNORED_STEPS = 10  # the first steps, whose moving average contains only a few losses
MIN_STEPS = IGNORED_STEPS + 3  # steps that a suggestion needs
DIVERGENCE = 4.0  # the sweep ends when the loss exceeds this factor times the lowest loss


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The training losses of a group of variables while its learning rate rose.

    Attributes:
      group: the display name of the group.
      rates: the learning rates.
      losses: the smoothed training loss at each rate, in nats.
      suggestion: the rate at which the loss falls fastest; None if the loss does not fall.
    """

    group: str
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    suggestion: float | None

    @property
    def why_none(self) -> str:
        """The reason why there is no suggestion, if there is none."""
        if len(self.rates) < MIN_STEPS:
            return f"because the loss diverged within {len(self.rates) + 1} steps"
        return "because the loss does not fall"


def suggest_learning_rates(run: Run, picture: Path) -> None:
    """Finds learning rates, prints them, and draws the sweeps.

    Raises:
      UserError: the picture cannot be written.
    """
    from research.runs import pictures  # imports Matplotlib, which other runs do not need here

    source = run.loader.source
    for line in (*console.splits_lines(source), *console.notes_lines(source)):
        print(line, flush=True)
    sweeps = find_learning_rates(run)
    write_file(picture, pictures.png(pictures.learning_rates(sweeps)))
    print(console.suggestions(sweeps, picture), flush=True)


def find_learning_rates(run: Run) -> list[Sweep]:
    """Sweeps the learning rate of each group, starting from the same weights.

    One group is trained at a time. The head keeps its initial weights while other groups are
    trained.

    Args:
      run: the run; its own learning rates and schedules are ignored.
    """
    config, network, state, strategy = run.config, run.built.network, run.state, run.team.strategy

    def endless_batches() -> Iterator[Batch]:
        for epoch in itertools.count():
            epoch_batches = functools.partial(run.loader.epoch_batches, epoch, 0)
            yield from share_out(epoch_batches, strategy, config.accumulate_steps)

    batches = endless_batches()
    options = dataclasses.replace(run.options, xla=config.xla == "on")  # few steps per group
    sweeps = []
    for group in run.groups:
        before = [variable.numpy() for variable in network.model.variables]
        rising = Rising(LOWEST_RATE, HIGHEST_RATE, state.current_step, state.current_step + STEPS)
        with strategy.scope():
            trained = build_group(config, group.name, group.variables, rising, state.step)
        learner = Learner(
            strategy, run.task, network, (trained,), state, options, finish=run.loader.finish
        )
        sweeps.append(sweep_rates(learner, rising, batches))
        for variable, value in zip(network.model.variables, before, strict=True):
            variable.assign(value)
    return sweeps


def sweep_rates(learner: Learner, rising: Rising, batches: Iterator[Batch]) -> Sweep:
    """Trains the learner's first group with a rising learning rate, until the loss diverges."""
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
        if smoothed[-1] > DIVERGENCE * min(smoothed):
            break
    smoothed = smooth(losses)
    suggestion = suggest_rate(rates, smoothed or [0.0])
    return Sweep(learner.groups[0].title, tuple(rates), smoothed, suggestion)


def smooth(losses: Sequence[float]) -> tuple[float, ...]:
    """Returns an exponential moving average, with the bias correction of Adam."""
    smoothed, average = [], 0.0
    for count, loss in enumerate(losses, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        smoothed.append(average / (1 - SMOOTHING**count))
    return tuple(smoothed)


def suggest_rate(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """Returns the rate at which the loss falls fastest (Smith 2017, arXiv 1506.01186).

    Args:
      rates: the learning rates, in a geometric sequence.
      losses: smoothed, one for each rate.

    Returns:
      None if the loss does not fall.
    """
    if len(losses) < MIN_STEPS:
        return None
    kept_losses, kept_rates = np.asarray(losses[IGNORED_STEPS:]), rates[IGNORED_STEPS:]
    lowest = int(np.argmin(kept_losses))
    if lowest < 2 or kept_losses[lowest] >= kept_losses[0]:
        return None
    slopes = np.gradient(kept_losses, np.log(np.asarray(kept_rates)))
    return float(kept_rates[int(np.argmin(slopes[: lowest + 1]))])
