"""`Plan`: the number of steps of a run, and the position of a step in it."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from research.settings.durations import count_steps
from research.settings.train_config import TrainConfig


class Position(NamedTuple):
    """A position in a run.

    Attributes:
      epoch: index of the epoch, from 0.
      steps_done: updates made in the epoch; all of them if only the validation is left.
    """

    epoch: int
    steps_done: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """The numbers of steps of a run, derived from the settings and the number of photos.

    Attributes:
      steps_per_epoch: updates per epoch.
      head_epochs: initial epochs that train only the head.
      epochs: all epochs, including `head_epochs`.
      visits: the average number of times that a photo is used in training.
      warmup_steps: steps in which a learning rate rises to its peak.
      unfreezing_steps: steps between the unfreezing of two stages; 0 to unfreeze all at once.
      validates: whether each epoch ends with a validation.
    """

    steps_per_epoch: int
    head_epochs: int
    epochs: int
    visits: float
    warmup_steps: int = 0
    unfreezing_steps: int = 0
    validates: bool = True

    @property
    def head_steps(self) -> int:
        """Initial steps that train only the head."""
        return self.head_epochs * self.steps_per_epoch

    @property
    def steps(self) -> int:
        """All steps of the run."""
        return self.epochs * self.steps_per_epoch

    def next_due(self, step: int, *every: int | None) -> int:
        """Returns the next step that is a multiple of one of `every`, or that ends the epoch.

        Args:
          step: updates made so far.
          every: numbers of steps; None is ignored.
        """
        return min(
            (step // number + 1) * number for number in (*every, self.steps_per_epoch) if number
        )

    def position(self, step: int, awaits_validation: bool = False) -> Position:
        """Returns the position from which a run continues after `step` updates.

        Args:
          step: updates made so far.
          awaits_validation: whether updates were made since the last validation.
        """
        epoch, done = divmod(step, self.steps_per_epoch)
        if done == 0 and awaits_validation:
            return Position(epoch - 1, self.steps_per_epoch)
        return Position(epoch, done)


def make_plan(config: TrainConfig, photos: int, validates: bool = True) -> Plan:
    """Computes the plan of a run.

    Args:
      config: the run's settings.
      photos: the number of training photos.
      validates: whether there are validation photos.
    """
    all_steps = config.steps_per_pass(photos)
    steps = config.steps_per_epoch or all_steps
    epochs = config.head_epochs + config.epochs
    return Plan(
        steps,
        config.head_epochs,
        epochs,
        visits=epochs * steps / all_steps,
        warmup_steps=count_steps(config.warmup, steps),
        unfreezing_steps=(config.gradual_unfreezing or 0) * steps,
        validates=validates,
    )
