"""`Learner`: compiles the steps of `steps.py` and runs them on all devices."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import tensorflow as tf

from research.data.batches import Batch
from research.loop.device_loop import compile_loop
from research.loop.run_state import RunState
from research.loop.steps import (
    Network,
    Update,
    add_gradients,
    apply_gradients,
    eval_step,
    reduce_gradients,
)
from research.models.batch_norm import compile_averaging, trained_statistics
from research.optimization.averages import WeightAverages
from research.optimization.groups import Group
from research.runs.histograms import Histograms
from research.tasks.checks import check_gradients
from research.tasks.metrics import Metrics, Sums, SumsRead, mean_metrics
from research.tasks.task import Gradients, Task

Scalars = dict[str, tf.Tensor]

# Steps between two fetches of metrics from the device. Fetching at each step would be slow.
STEPS_IN_A_LOOP, STEPS_ONE_BY_ONE = 100, 10


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """How training steps are computed.

    Attributes:
      accumulate_steps: batches per step, computed one after another to save memory.
      clip_norm: the largest allowed norm of the gradient; None for no limit.
      xla: whether to compile the step with XLA; on several devices, the passes of each device.
      deterministic: whether TensorFlow only allows deterministic operations.
      exchange: the number format in which devices send gradients; see `sum_gradients`.
    """

    accumulate_steps: int = 1
    clip_norm: float | None = None
    xla: bool = False
    deterministic: bool = False
    exchange: str = "float32"


class StepsDone(NamedTuple):
    """The result of some training steps.

    Attributes:
      scalars: the scalars of the last step, by tag; see `Learner.train_step`.
      waiting_seconds: time spent waiting for input.
      steps: the number of steps.
    """

    scalars: Scalars
    waiting_seconds: float
    steps: int


class Learner:
    """A network, its parameter groups and a run's state, on all devices of a strategy.

    Args:
      strategy: the strategy in whose scope the other arguments were built.
      task: losses, metrics and gradients.
      network: the model, and the kind of its input.
      groups: the parameter groups to train. If `head` is the only one, the backbone runs in
        inference mode.
      state: the run's step counter and sums.
      options: how training steps are computed.
      averages: averages of the weights, updated in training and used in evaluation; None for none.
      histograms: writes histograms of weights and gradients; None for none.
      finish: see `DataLoader.finish`; None for batches of a loader that does not need it.
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
        finish: Callable[[Batch], Batch] | None = None,
    ) -> None:
        self.strategy = strategy
        self.task = task
        # If only the head is trained, BatchNorm and Dropout of the backbone stay in inference mode.
        trains_backbone = any(group.name != "head" for group in groups)
        self.network = dataclasses.replace(network, trains_backbone=trains_backbone)
        self.groups = groups
        self.state = state
        self.options = options
        self.averages = averages
        self.histograms = histograms
        self._finish = finish or (lambda batch: batch)
        with strategy.scope():
            self._eval_tally = state.tally.empty_copy()
        self._train_step = self._compile_train_step()
        self._train_loop = compile_loop(self._train_step, strategy)
        self._eval_step = self._compile_eval_step()
        self._average_statistics = compile_averaging(
            trained_statistics(self.network.model), strategy
        )

    def train_step(self, batch: Batch) -> Scalars:
        """Runs one training step and returns its scalars by tag.

        They are the gradient norm of each group, and the penalty if weights have a regularizer. In
        float16, a step with overflowed gradients changes only the step counter and the loss scale.
        """
        return self._train_step(batch)

    def _compile_train_step(self) -> tf.types.experimental.GenericFunction:
        """Returns the compiled training step over all devices."""
        strategy, network, state, options = self.strategy, self.network, self.state, self.options
        loss_scale, groups = state.loss_scale, self.groups
        clip_norm, exchange = options.clip_norm, options.exchange
        variables = [variable for group in groups for variable in group.variables]

        def compute(batch: Batch, scale: tf.Tensor) -> Gradients:
            found = self.task.gradients(network, self._finish(batch), variables, scale)
            check_gradients(self.task, found, variables, state.tally.names)
            return found

        # XLA cannot compile an exchange between devices, nor histograms.
        whole = options.xla and strategy.num_replicas_in_sync == 1 and not self.histograms
        part = options.xla and not whole
        compiled = tf.function(compute, jit_compile=True, autograph=False) if part else compute

        @tf.function(autograph=False, jit_compile=whole or None)
        def step(batch: Batch) -> Scalars:
            # Scales the gradient of the mean loss, so that a large batch does not overflow.
            scale = loss_scale.scale / float(self._photos_per_step(batch))
            gradients = self._accumulated(lambda part: compiled(part, scale), batch)
            update: Update = strategy.run(
                lambda part: reduce_gradients(groups, part, clip_norm, scale, exchange),
                (gradients,),
            )
            sums = self._first_of_each(update.sums)
            if loss_scale.active:
                finite = self._first(update.finite)
                tf.cond(finite, lambda: self._apply(update), lambda: tf.constant(False))
                loss_scale.update(finite)
                # A skipped batch is excluded from the training metrics.
                sums = {name: tf.where(finite, value, 0.0) for name, value in sums.items()}
            else:
                self._apply(update)
            state.tally.add(sums)
            state.step.assign_add(1)
            if self.histograms:
                means = [self._first(gradient) for gradient in update.gradients]
                self.histograms.write(self._first(state.step), variables, means)
            norms = self._first_of_each(update.norms)
            scalars = {f"gradient_norm/{name}": norm for name, norm in norms.items()}
            if any(variable.regularizer is not None for variable in variables):
                scalars["penalty"] = self._first(update.penalty)
            return scalars

        return step

    def _apply(self, update: Update) -> tf.Tensor:
        """Updates the weights and their averages."""
        self.strategy.run(lambda values: apply_gradients(self.groups, values), (update.gradients,))
        if self.averages:
            for group in self.groups:
                updates = self.state.step - group.schedule.first_step
                self.averages.update(group.variables, updates)
        return tf.constant(True)

    def _accumulated(self, compute: Callable[[Batch], Gradients], batch: Batch) -> Gradients:
        """Runs `compute` on the batches of a step, one after another, and adds the results."""
        strategy, steps = self.strategy, self.options.accumulate_steps

        def compute_part(index: tf.Tensor | int) -> Gradients:
            def on_replica(batch: Batch) -> Gradients:
                part = tf.nest.map_structure(
                    lambda tensor: tf.reshape(tensor, (steps, -1, *tensor.shape[1:]))[index], batch
                )
                return compute(part)

            return strategy.run(on_replica if steps > 1 else compute, (batch,))

        def add(index: tf.Tensor, total: Gradients) -> tuple[tf.Tensor, Gradients]:
            return index + 1, strategy.run(add_gradients, (total, compute_part(index)))

        if steps == 1:
            return compute_part(0)
        # Parallel iterations would need as much memory as one large batch.
        _, total = tf.while_loop(
            lambda index, _: index < steps, add, (1, compute_part(0)), parallel_iterations=1
        )
        return total

    @property
    def steps_per_interval(self) -> int:
        """Steps between two fetches of metrics, for which the host waits for the device."""
        return STEPS_IN_A_LOOP if self._loops_on_device else STEPS_ONE_BY_ONE

    @property
    def _loops_on_device(self) -> bool:
        # Starting a step from Python takes longer than a step that trains only the head. The loop
        # reads the clock, which is not a deterministic operation.
        return self.network.input_kind == "features" and not self.options.deterministic

    def train_steps(
        self, batches: Iterator[Batch], count: int, should_stop: Callable[[], bool] = lambda: False
    ) -> StepsDone:
        """Runs at least one and at most `count` training steps.

        Args:
          batches: one per step.
          count: the number of steps.
          should_stop: returns whether to stop early. It is called before each step except the
            first, and is not called if the steps run in a loop on the device.
        """
        if self._loops_on_device:
            scalars, waited = self._train_loop(batches, tf.constant(count))
            return StepsDone(scalars, float(waited), count)
        waiting, scalars, steps = 0.0, {}, 0
        while steps == 0 or (steps < count and not should_stop()):
            begin = time.perf_counter()
            batch = next(batches)
            waiting += time.perf_counter() - begin
            scalars = self.train_step(batch)
            steps += 1
        return StepsDone(scalars, waiting, steps)

    def _compile_eval_step(self) -> tf.types.experimental.GenericFunction:
        """Returns the compiled step that adds a batch's sums to the sums of the evaluation."""
        task, network, finish = self.task.for_validation(), self.network, self._finish

        @tf.function(autograph=False)
        def step(batch: Batch) -> None:
            sums = self.strategy.run(lambda one: eval_step(task, network, finish(one)), (batch,))
            self._eval_tally.add(self._first_of_each(sums))

        return step

    def evaluate(self, batches: Iterable[Batch]) -> Metrics:
        """Returns the metrics over batches, in inference mode; each photo counts once."""
        self._eval_tally.reset()
        with self.averages.swapped() if self.averages else contextlib.nullcontext():
            for batch in batches:
                self._eval_step(batch)
        return self.metrics(self._eval_tally.read())

    def metrics(self, sums: SumsRead) -> Metrics:
        """Returns the metrics computed from weighted sums."""
        return mean_metrics(sums, self.task.figures)

    def average_statistics(self) -> None:
        """Replaces the BatchNorm statistics of each device with their mean over all devices.

        Without this, the evaluated model would differ from the saved one.
        """
        if self._average_statistics:
            self._average_statistics()

    def _photos_per_step(self, batch: Batch) -> int:
        part = self._first(batch["weight"])
        return part.shape[0] * self.strategy.num_replicas_in_sync

    def _first(self, value: tf.Tensor) -> tf.Tensor:
        """Returns the value on the first device, for a value that is the same on all devices."""
        return self.strategy.experimental_local_results(value)[0]

    def _first_of_each(self, values: Sums) -> Sums:
        return {name: self._first(value) for name, value in values.items()}
