"""`Plan`: the number of steps of a run, and the position of a step in it."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from research.settings.durations import count_steps
from research.settings.train_config import TrainConfig


class Position(NamedTuple):
    """A position in a run.

    Attributes:
      epoch: counted from 0.
      steps_done: updates made in the epoch; all of them if only the validation is left.
    """

    epoch: int
    steps_done: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """The steps of a run, all derived from the settings and the number of photos.

    Attributes:
      steps_per_epoch: updates per epoch.
      head_epochs: epochs at the beginning that train the head alone.
      epochs: all epochs, including `head_epochs`.
      visits: how often a photo is trained on, on average over all photos.
      warmup_steps: steps in which a learning rate rises to its value.
      unfreezing_steps: steps between the beginnings of two stages; 0 if all begin together.
    """

    steps_per_epoch: int
    head_epochs: int
    epochs: int
    visits: float
    warmup_steps: int = 0
    unfreezing_steps: int = 0

    @property
    def head_steps(self) -> int:
        """Steps at the beginning that train the head alone."""
        return self.head_epochs * self.steps_per_epoch

    @property
    def steps(self) -> int:
        """All steps of the run."""
        return self.epochs * self.steps_per_epoch

    def next_due(self, step: int, *every: int | None) -> int:
        """Returns the first step after `step` that is a multiple of one of some numbers.

        Args:
          step: updates made so far.
          every: the numbers; None for never.

        Returns:
          The end of the epoch at the latest.
        """
        return min(
            (step // number + 1) * number for number in (*every, self.steps_per_epoch) if number
        )

    def position(self, step: int, awaits_validation: bool = False) -> Position:
        """Returns the position from which a run continues after `step` updates.

        Args:
          step: updates made so far.
          awaits_validation: whether steps were made since the last validation.
        """
        epoch, done = divmod(step, self.steps_per_epoch)
        if done == 0 and awaits_validation:
            return Position(epoch - 1, self.steps_per_epoch)
        return Position(epoch, done)


def make_plan(config: TrainConfig, photos: int) -> Plan:
    """Plans a run.

    Args:
      config: of the run.
      photos: the number of training photos.
    """
    all_steps = math.ceil(photos / (config.batch_size * config.accumulate_steps))
    steps = min(all_steps, config.steps_per_epoch or all_steps)
    epochs = config.head_epochs + config.epochs
    return Plan(
        steps,
        config.head_epochs,
        epochs,
        visits=epochs * steps / all_steps,
        warmup_steps=count_steps(config.warmup, steps),
        unfreezing_steps=(config.gradual_unfreezing or 0) * steps,
    )
