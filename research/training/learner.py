"""`Learner`: compiles the steps of `steps.py` and runs them on all devices."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import tensorflow as tf

from research.data.batches import Batch
from research.models.network import Network
from research.models.wrapper import trained_statistics
from research.optimization.averages import WeightAverages
from research.optimization.groups import Group
from research.runs.histograms import Histograms
from research.tasks.metrics import Metrics, SumsRead, mean_metrics
from research.tasks.task import Gradients, Task
from research.training.run_state import RunState
from research.training.steps import (
    Update,
    add_gradients,
    apply_gradients,
    eval_step,
    reduce_gradients,
)

# Steps between two looks at what they did: few enough to see, too many to be slowed down by it.
STEPS_IN_A_LOOP, STEPS_ONE_BY_ONE = 100, 10


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """How training steps are computed.

    Attributes:
      accumulate_steps: batches per step, computed one after another to take less memory.
      clip_norm: the greatest norm of the gradient; None for any.
      xla: compile each device's forward and backward pass with XLA.
    """

    accumulate_steps: int = 1
    clip_norm: float | None = None
    xla: bool = False


class StepsDone(NamedTuple):
    """What some training steps leave behind.

    Attributes:
      scalars: of the last step, by tag; see `Learner.train_step`.
      waiting_seconds: how long they waited for input.
      number: how many they were.
    """

    scalars: dict[str, tf.Tensor]
    waiting_seconds: float
    number: int


class Learner:
    """A network, its parameter groups and a run's state, on all devices of a strategy.

    The steps themselves are in `steps.py`; here they are compiled, run on every device, and what
    they return is added up without waiting for the devices.

    Args:
      strategy: that everything was built under.
      task: what is learned.
      network: what the steps compute with.
      groups: the parameter groups to train; where `head` is alone, the backbone runs in inference
        mode.
      state: the run's clock and sums.
      options: how training steps are computed.
      averages: of the weights, to follow in training and to evaluate; None to evaluate the weights.
      histograms: to write of weights and gradients; None for none.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        task: Task,
        network: Network,
        groups: tuple[Group, ...],
        state: RunState,
        options: StepOptions = StepOptions(),
        averages: WeightAverages | None = None,
        histograms: Histograms | None = None,
    ) -> None:
        self.strategy = strategy
        self.task = task
        # While the head is trained alone, the backbone's BatchNorm and Dropout rest too.
        trains_backbone = any(group.name != "head" for group in groups)
        self.network = dataclasses.replace(network, trains_backbone=trains_backbone)
        self.groups = groups
        self.state = state
        self.options = options
        self.averages = averages
        self.histograms = histograms
        with strategy.scope():
            self._eval_tally = state.tally.empty_copy()
        self._train_step = self._compile_train_step()
        self._train_loop = self._compile_train_loop()
        self._eval_step = self._compile_eval_step()
        self._average_statistics = self._compile_average_statistics()

    def _compile_train_step(self) -> tf.types.experimental.GenericFunction:
        """Returns the step that updates the groups, for all devices together."""
        strategy, network, state, options = self.strategy, self.network, self.state, self.options
        averages = self.averages
        loss_scale, trained = state.loss_scale, self.groups
        variables = [variable for group in trained for variable in group.variables]

        def compute(batch: Batch, scale: tf.Tensor) -> Gradients:
            return self.task.gradients(network, batch, variables, scale)

        # Only this is compiled: XLA takes no step that spans several devices.
        compiled = (
            tf.function(compute, jit_compile=True, autograph=False) if options.xla else compute
        )

        @tf.function(autograph=False)
        def step(batch: Batch) -> dict[str, tf.Tensor]:
            # Of the mean loss, whatever the batch's size: its gradients are what must not overflow.
            scale = loss_scale.scale / float(self._photos_a_step(batch))
            gradients = self._accumulated(lambda part: compiled(part, scale), batch)
            update: Update = strategy.run(
                lambda part: reduce_gradients(trained, part, options.clip_norm, scale), (gradients,)
            )

            def apply() -> tf.Tensor:
                strategy.run(lambda values: apply_gradients(trained, values), (update.gradients,))
                if averages:
                    for group in trained:
                        averages.update(group.variables, state.step - group.schedule.first_step)
                return tf.constant(True)

            sums = {name: self._first(value) for name, value in update.sums.items()}
            if loss_scale.active:
                finite = self._first(update.finite)
                tf.cond(finite, apply, lambda: tf.constant(False))
                loss_scale.update(finite)
                # A batch that was not learned from is in no figure of the training.
                sums = {name: tf.where(finite, value, 0.0) for name, value in sums.items()}
            else:
                apply()
            state.tally.add(sums)
            state.step.assign_add(1)
            if self.histograms:
                gradient_means = [self._first(gradient) for gradient in update.gradients]
                self.histograms.write(self._first(state.step), variables, gradient_means)
            scalars = {
                f"gradient_norm/{name}": self._first(norm) for name, norm in update.norms.items()
            }
            if any(variable.regularizer is not None for variable in variables):
                scalars["penalty"] = self._first(update.penalty)
            return scalars

        return step

    def _accumulated(self, compute: Callable[[Batch], Gradients], batch: Batch) -> Gradients:
        """Runs `compute` over a step's batches, one after another, and adds up what it returns."""
        strategy, steps = self.strategy, self.options.accumulate_steps

        def of_part(index: tf.Tensor | int) -> Gradients:
            def on_replica(batch: Batch) -> Gradients:
                part = tf.nest.map_structure(
                    lambda tensor: tf.reshape(tensor, (steps, -1, *tensor.shape[1:]))[index], batch
                )
                return compute(part)

            return strategy.run(on_replica if steps > 1 else compute, (batch,))

        def add(index: tf.Tensor, total: Gradients) -> tuple[tf.Tensor, Gradients]:
            return index + 1, strategy.run(add_gradients, (total, of_part(index)))

        if steps == 1:
            return of_part(0)
        # One at a time, or they would take the memory of the batch that they stand for.
        _, total = tf.while_loop(
            lambda index, _: index < steps, add, (1, of_part(0)), parallel_iterations=1
        )
        return total

    @property
    def steps_an_interval(self) -> int:
        """Steps after which to fetch figures, for which the host waits for the device."""
        return STEPS_IN_A_LOOP if self._loops_on_device else STEPS_ONE_BY_ONE

    @property
    def _loops_on_device(self) -> bool:
        # A step of the head alone is shorter than the time that Python takes to start it.
        return self.network.given == "features"

    def train_steps(
        self, batches: Iterator[Batch], count: int, is_enough: Callable[[], bool] = lambda: False
    ) -> StepsDone:
        """Makes some updates, at least one, with as many batches.

        Args:
          batches: one a step.
          count: how many.
          is_enough: asked before each step but the first, where steps are started one by one.
        """
        if self._loops_on_device:
            scalars, waited = self._train_loop(batches, tf.constant(count))
            return StepsDone(scalars, float(waited), count)
        waiting, scalars, number = 0.0, {}, 0
        while number == 0 or (number < count and not is_enough()):
            begin = time.perf_counter()
            batch = next(batches)
            waiting += time.perf_counter() - begin
            scalars = self.train_step(batch)
            number += 1
        return StepsDone(scalars, waiting, number)

    def _compile_train_loop(self) -> tf.types.experimental.GenericFunction:
        """Returns a function that makes several steps without coming back to Python."""

        def step(batches: Iterator[Batch]) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
            begin = tf.timestamp()
            with tf.control_dependencies([begin]):
                batch = next(batches)
            arrived = self.strategy.experimental_local_results(batch["label"])
            with tf.control_dependencies(arrived):
                waited = tf.timestamp() - begin
            return self._train_step(batch), waited

        @tf.function(autograph=False)
        def loop(
            batches: Iterator[Batch], count: tf.Tensor
        ) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
            def another(
                number: tf.Tensor, _: dict[str, tf.Tensor], waited: tf.Tensor
            ) -> tuple[tf.Tensor, dict[str, tf.Tensor], tf.Tensor]:
                scalars, more = step(batches)
                return number + 1, scalars, waited + more

            scalars, waited = step(batches)
            _, scalars, waited = tf.while_loop(
                lambda number, *_: number < count,
                another,
                (tf.constant(1), scalars, waited),
                parallel_iterations=1,
            )
            return scalars, waited

        return loop

    def _compile_eval_step(self) -> tf.types.experimental.GenericFunction:
        """Returns the step that adds a batch's sums to those of the evaluation."""

        task = self.task.for_validation()

        @tf.function(autograph=False)
        def step(batch: Batch) -> None:
            sums = self.strategy.run(lambda part: eval_step(task, self.network, part), (batch,))
            self._eval_tally.add({name: self._first(value) for name, value in sums.items()})

        return step

    def _compile_average_statistics(self) -> tf.types.experimental.GenericFunction | None:
        """Returns what averages BatchNorm's statistics over the devices; None where none learns."""
        statistics = trained_statistics(self.network.model)
        if not statistics:
            return None

        def on_replica() -> None:
            context = tf.distribute.get_replica_context()
            values = [tf.identity(variable.value) for variable in statistics]
            means = context.all_reduce(tf.distribute.ReduceOp.MEAN, values)
            for variable, mean in zip(statistics, means, strict=True):
                variable.assign(mean)

        @tf.function(autograph=False)
        def average() -> None:
            self.strategy.run(on_replica)

        return average

    def train_step(self, batch: Batch) -> dict[str, tf.Tensor]:
        """Makes one update; returns the step's scalars by tag.

        They are each updated group's gradient norm, and the penalty where weights have one.

        In float16, a step whose gradients overflowed only moves the clock and the loss scale.
        """
        return self._train_step(batch)

    def average_statistics(self) -> None:
        """Gives all devices the mean of the statistics that BatchNorm learned on each.

        Without this, what is evaluated would not be what is saved.
        """
        if self._average_statistics and self.strategy.num_replicas_in_sync > 1:
            self._average_statistics()

    def evaluate(self, batches: Iterable[Batch]) -> Metrics:
        """Returns the metrics over batches, in inference mode; each photo counts once."""
        self._eval_tally.reset()
        with self.averages.in_place() if self.averages else contextlib.nullcontext():
            for batch in batches:
                self._eval_step(batch)
        return self.metrics(self._eval_tally.read())

    def metrics(self, sums: SumsRead) -> Metrics:
        """Makes metrics of sums, as the task says."""
        return mean_metrics(sums, self.task.figures)

    def _photos_a_step(self, batch: Batch) -> int:
        part = self._first(batch["weight"])
        return part.shape[0] * self.strategy.num_replicas_in_sync

    def _first(self, value: tf.Tensor) -> tf.Tensor:
        """Returns the first device's value, of one that is the same on all."""
        return self.strategy.experimental_local_results(value)[0]
