"""Everything a run trains with: the model, its parameter groups and the state that is saved."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import keras
import tensorflow as tf

from research.backbone import Backbone, build_backbone, first_trainable_layer
from research.backbones import find_backbone
from research.batches import Batch
from research.config import WEIGHTS_BY_NAME, TrainConfig
from research.loss_scale import LossScale
from research.metrics import Metrics, Sums, Tally, mean_metrics
from research.model import Wrapper, freeze_below, penalize, trained_backbone, trained_statistics
from research.optimizers import Group, check_partition, make_group
from research.plan import Plan
from research.schedules import Schedule
from research.split import split_backbone
from research.steps import (
    Gradients,
    Network,
    Update,
    add_gradients,
    apply_gradients,
    compute_gradients,
    eval_step,
    reduce_gradients,
)
from research.weights import load_weights


@dataclasses.dataclass(frozen=True)
class BuiltNetwork:
    """A network ready to be trained.

    Attributes:
      network: the model and its two parts.
      backbone: the table's entry.
      first_trainable: index of the first backbone layer that is trained.
      origin: where the backbone's weights came from, in a few words.
    """

    network: Network
    backbone: Backbone
    first_trainable: int
    origin: str


def build_network(config: TrainConfig, num_classes: int, with_weights: bool = True) -> BuiltNetwork:
    """Builds the model of a config, under the caller's strategy scope.

    Args:
      config: of the run.
      num_classes: the number of classes.
      with_weights: False leaves the backbone as initialised, for a checkpoint to fill.

    Raises:
      UserError: the weights cannot be had or do not fit, or `unfreeze_from` names no layer.
    """
    # Again, as reading data may have drawn from the generators that initial weights come from.
    keras.utils.set_random_seed(config.seed)
    backbone = find_backbone(config.backbone)
    named = with_weights and config.weights == "imagenet"
    base_model = build_backbone(backbone, config.image_size, "imagenet" if named else None)
    first = first_trainable_layer(base_model, backbone, config.unfreeze_from)
    total = len(base_model.variables)
    origin = f"loaded {total} of {total} variables, ImageNet" if named else "none loaded, random"
    if with_weights and config.weights not in WEIGHTS_BY_NAME:
        origin = str(load_weights(base_model, config.weights))
    model = Wrapper(base_model, num_classes, config.seed)
    freeze_below(base_model, first, config.bn_mode)
    penalize(model, config.l2_penalty)
    return BuiltNetwork(Network(model, split_backbone(base_model, first)), backbone, first, origin)


class RunState:
    """What a run must remember besides its model and optimizers. Built under a strategy scope.

    Attributes:
      step: int64, the run's one clock: steps made so far, those skipped by float16 included.
      loss_scale: for float16.
      tally: the training sums of the epoch under way.
      best_loss: the least validation loss so far, infinite before the first.
      seconds: time spent training so far, over all resumptions.
    """

    def __init__(self) -> None:
        self.step = tf.Variable(
            0,
            trainable=False,
            dtype=tf.int64,
            name="step",
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )
        self.loss_scale = LossScale(keras.config.dtype_policy().compute_dtype == "float16")
        self.tally = Tally()
        self.best_loss = tf.Variable(math.inf, trainable=False, dtype=tf.float64)
        self.seconds = tf.Variable(0.0, trainable=False, dtype=tf.float64)

    @property
    def variables(self) -> list[tf.Variable]:
        """All that is remembered."""
        scale = self.loss_scale
        return [
            self.step,
            self.tally.variable,
            self.best_loss,
            self.seconds,
            scale.scale,
            scale.good_steps,
            scale.skipped_steps,
        ]

    @property
    def current_step(self) -> int:
        """Fetches the clock from the device."""
        return int(tf.convert_to_tensor(self.step))


def make_groups(
    config: TrainConfig, model: Wrapper, step: tf.Variable, plan: Plan
) -> tuple[Group, ...]:
    """Puts each trainable variable in the group `head` or `backbone`; frozen ones in neither.

    The backbone's schedule begins after the epochs that train the head alone.
    """
    head = Schedule(
        config.head_schedule, config.head_learning_rate, 0, plan.steps, config.warmup_steps
    )
    groups = [
        make_group(
            "head",
            model.head.trainable_variables,
            config.head_optimizer,
            head,
            step,
            config.weight_decay,
        )
    ]
    unfrozen = trained_backbone(model)
    if unfrozen:
        schedule = Schedule(
            config.backbone_schedule,
            config.backbone_learning_rate,
            plan.head_steps,
            plan.steps,
            config.warmup_steps,
        )
        groups.append(
            make_group(
                "backbone", unfrozen, config.backbone_optimizer, schedule, step, config.weight_decay
            )
        )
    check_partition(groups, model.trainable_variables)
    return tuple(groups)


def make_checkpoint(
    model: Wrapper, groups: tuple[Group, ...], state: RunState
) -> tf.train.Checkpoint:
    """Names all that a run resumes from.

    Random layers, such as Dropout, count their draws in variables that Keras keeps apart from a
    layer's weights, and that a checkpoint of the model alone leaves out.
    """
    weights = {id(variable) for variable in model.weights}
    counters = [variable.value for variable in model.variables if id(variable) not in weights]
    optimizers: dict[str, keras.optimizers.Optimizer] = {
        f"{group.name}_optimizer": group.optimizer for group in groups
    }
    return tf.train.Checkpoint(
        model=model,
        random_counters=counters,
        step=state.step,
        tally=state.tally.variable,
        best_loss=state.best_loss,
        seconds=state.seconds,
        loss_scale=state.loss_scale.scale,
        good_steps=state.loss_scale.good_steps,
        skipped_steps=state.loss_scale.skipped_steps,
        **optimizers,
    )


def variables_of(model: Wrapper, groups: tuple[Group, ...], state: RunState) -> list[tf.Variable]:
    """Returns all variables that a checkpoint of `make_checkpoint` holds."""
    return [
        *(variable.value for variable in model.variables),
        *(variable.value for group in groups for variable in group.optimizer.variables),
        *state.variables,
    ]


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """How training steps are computed.

    Attributes:
      accumulate_steps: batches a step, worked through one after another to take less memory.
      clip_norm: the greatest norm of the gradient; None for any.
      xla: compile each device's forward and backward pass with XLA.
    """

    accumulate_steps: int = 1
    clip_norm: float | None = None
    xla: bool = False


class Learner:
    """A network, its parameter groups and a run's state, on all devices of a strategy.

    The steps themselves are in `steps.py`; here they are compiled, run on every device, and what
    they return is added up without waiting for the devices.

    Args:
      strategy: that everything was built under.
      network: what the steps compute with.
      groups: the parameter groups, `head` first.
      state: the run's clock and sums.
      options: how training steps are computed.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        network: Network,
        groups: tuple[Group, ...],
        state: RunState,
        options: StepOptions = StepOptions(),
    ) -> None:
        self.strategy = strategy
        self.network = network
        self.groups = groups
        self.state = state
        self.options = options
        with strategy.scope():
            self._eval_tally = Tally()

        @tf.function
        def run_eval_step(batch: Batch) -> None:
            sums = strategy.run(lambda part: eval_step(network, part), (batch,))
            self._eval_tally.add(Sums(*map(self._first, sums)))

        @tf.function
        def average_statistics() -> None:
            def on_replica() -> None:
                context = tf.distribute.get_replica_context()
                values = [tf.identity(variable.value) for variable in statistics]
                means = context.all_reduce(tf.distribute.ReduceOp.MEAN, values)
                for variable, mean in zip(statistics, means, strict=True):
                    variable.assign(mean)

            strategy.run(on_replica)

        statistics = trained_statistics(network.model)
        self._average_statistics = average_statistics if statistics else None
        self._train_head = self._compile_train_step(groups[:1])
        self._train_all = self._compile_train_step(groups)
        self._eval_step = run_eval_step

    def _compile_train_step(
        self, trained: tuple[Group, ...]
    ) -> tf.types.experimental.GenericFunction:
        """Returns the step that updates these groups, for all devices together."""
        strategy, network, state, options = self.strategy, self.network, self.state, self.options
        loss_scale = state.loss_scale
        variables = [variable for group in trained for variable in group.variables]
        # While the head is trained alone, the backbone's BatchNorm and Dropout rest too.
        training = any(group.name == "backbone" for group in trained)

        def compute(batch: Batch, scale: tf.Tensor) -> Gradients:
            return compute_gradients(network, batch, variables, training, scale)

        # Only this is compiled: XLA takes no step that spans several devices.
        compiled = tf.function(compute, jit_compile=True) if options.xla else compute

        @tf.function
        def step(batch: Batch) -> dict[str, tf.Tensor]:
            # Of the mean loss, whatever the batch's size: its gradients are what must not overflow.
            scale = loss_scale.scale / float(self._photos_a_step(batch))
            gradients = self._accumulated(lambda part: compiled(part, scale), batch)
            update: Update = strategy.run(
                lambda part: reduce_gradients(trained, part, options.clip_norm, scale), (gradients,)
            )

            def apply() -> tf.Tensor:
                strategy.run(lambda values: apply_gradients(trained, values), (update.gradients,))
                return tf.constant(True)

            sums = Sums(*map(self._first, update.sums))
            if loss_scale.active:
                finite = self._first(update.finite)
                tf.cond(finite, apply, lambda: tf.constant(False))
                loss_scale.update(finite)
                # A batch that was not learned from is in no figure of the training.
                sums = Sums(*(tf.where(finite, value, 0.0) for value in sums))
            else:
                apply()
            state.tally.add(sums)
            state.step.assign_add(1)
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

    def train_step(self, batch: Batch, head_alone: bool = False) -> dict[str, tf.Tensor]:
        """Makes one update; returns the step's scalars by tag: each updated group's gradient norm.

        In float16, a step whose gradients overflowed only moves the clock and the loss scale.
        """
        return self._train_head(batch) if head_alone else self._train_all(batch)

    def average_statistics(self) -> None:
        """Gives all devices the mean of the statistics that BatchNorm learned on each.

        Without this, what is evaluated would not be what is saved.
        """
        if self._average_statistics and self.strategy.num_replicas_in_sync > 1:
            self._average_statistics()

    def evaluate(self, batches: tf.data.Dataset) -> Metrics:
        """Returns the metrics over batches, in inference mode; each photo counts once."""
        self._eval_tally.reset()
        for batch in batches:
            self._eval_step(batch)
        return mean_metrics(self._eval_tally.read())

    def _photos_a_step(self, batch: Batch) -> int:
        part = self._first(batch["weight"])
        return part.shape[0] * self.strategy.num_replicas_in_sync

    def _first(self, value: tf.Tensor) -> tf.Tensor:
        """Returns the first device's value, of one that is the same on all."""
        return self.strategy.experimental_local_results(value)[0]
