"""`RunState`: the step counter and sums of a run; and the variables of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping

import keras
import tensorflow as tf

from research.loop.meter import Stopwatch
from research.models.wrapper import Wrapper
from research.optimization.averages import WeightAverages
from research.optimization.groups import Group
from research.optimization.loss_scale import LossScale
from research.tasks.metrics import Tally


class RunState:
    """The part of a checkpoint besides model and optimizers. Create it in a strategy scope.

    Args:
      shapes: the shapes of the training sums, by name.

    Attributes:
      step: int64, the only step counter of the run: steps so far, including steps that float16
        skipped.
      loss_scale: the loss scale for float16.
      tally: the training sums of the current epoch.
      best_loss: the lowest validation loss so far; infinite before the first validation.
      epochs_without_gain: int64, number of epochs since the lowest validation loss that count for
        early stopping.
      seconds: total time since the network was built, over all processes of the run. It includes
        running the frozen layers, validation and checkpoints. It excludes work that was lost when
        a process was killed.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.step = tf.Variable(
            0,
            trainable=False,
            dtype=tf.int64,
            name="step",
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )
        self.loss_scale = LossScale(keras.config.dtype_policy().compute_dtype == "float16")
        self.tally = Tally(shapes)
        self.best_loss = tf.Variable(math.inf, trainable=False, dtype=tf.float64)
        self.epochs_without_gain = tf.Variable(0, trainable=False, dtype=tf.int64)
        self.seconds = tf.Variable(0.0, trainable=False, dtype=tf.float64)
        self._stopwatch = Stopwatch()

    def count_seconds(self) -> None:
        """Adds the time since the last call, or since the run was set up, to `seconds`."""
        self.seconds.assign_add(self._stopwatch.lap())

    @property
    def within_epoch(self) -> bool:
        """Whether updates were made since the last validation."""
        return bool(self.tally.read()["weight"] > 0)

    def note_validation(self, loss: float, counts: bool) -> bool:
        """Records a validation loss, and returns whether it is the lowest so far.

        Args:
          loss: in nats.
          counts: whether the epoch counts for early stopping.
        """
        is_best = loss < float(self.best_loss.numpy())
        if is_best:
            self.best_loss.assign(loss)
            self.epochs_without_gain.assign(0)
        elif counts:
            self.epochs_without_gain.assign_add(1)
        return is_best

    @property
    def variables(self) -> dict[str, tf.Variable]:
        """All variables by their names in a checkpoint."""
        return {
            "step": self.step,
            "tally": self.tally.variable,
            "best_loss": self.best_loss,
            "epochs_without_gain": self.epochs_without_gain,
            "seconds": self.seconds,
            "loss_scale": self.loss_scale.scale,
            "good_steps": self.loss_scale.good_steps,
            "skipped_steps": self.loss_scale.skipped_steps,
        }

    @property
    def current_step(self) -> int:
        """The number of steps so far, fetched from the device."""
        return int(tf.convert_to_tensor(self.step))


def make_checkpoint(
    model: Wrapper,
    groups: tuple[Group, ...],
    state: RunState,
    averages: WeightAverages | None = None,
) -> tf.train.Checkpoint:
    """Returns a checkpoint of everything that a run resumes from.

    Random layers, such as Dropout, count their draws in variables. Keras does not list these among
    a layer's weights, so a checkpoint of the model alone leaves them out.
    """
    weights = {id(variable) for variable in model.weights}
    counters = [variable.value for variable in model.variables if id(variable) not in weights]
    optimizers: dict[str, keras.optimizers.Optimizer] = {
        f"{group.name}_optimizer": group.optimizer for group in groups
    }
    return tf.train.Checkpoint(
        model=model,
        random_counters=counters,
        averages=averages.variables if averages else [],
        **state.variables,
        **optimizers,
    )


def variables_of(
    model: Wrapper,
    groups: tuple[Group, ...],
    state: RunState,
    averages: WeightAverages | None = None,
) -> list[tf.Variable]:
    """Returns all variables that a checkpoint of `make_checkpoint` holds."""
    return [
        *(variable.value for variable in model.variables),
        *(variable.value for group in groups for variable in group.optimizer.variables),
        *(averages.variables if averages else ()),
        *state.variables.values(),
    ]
