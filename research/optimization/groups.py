"""Parameter groups: the head and the backbone have their own optimizers and schedules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from research.models.wrapper import is_kernel
from research.optimization.schedules import LearningRate
from research.system.errors import UserError


@dataclasses.dataclass(frozen=True)
class Group:
    """Variables that one optimizer updates.

    Attributes:
      name: `head`, `backbone`, or `backbone_<stage>` if each stage is a group of its own.
      variables: the variables, in a fixed order.
      optimizer: an optimizer built for exactly these variables.
      schedule: the learning rate at each step of the run.
    """

    name: str
    variables: tuple[keras.Variable, ...]
    optimizer: keras.optimizers.Optimizer
    schedule: LearningRate

    @property
    def title(self) -> str:
        """The name for display, for example `backbone stage3`."""
        return self.name.replace("_", " ", 1)

    def apply(self, gradients: Sequence[tf.Tensor]) -> None:
        """Updates the variables with gradients that are already summed over the replicas."""
        self.optimizer.apply(list(gradients), list(self.variables))


def make_group(
    name: str,
    variables: Sequence[keras.Variable],
    build: Callable[[Callable[[], tf.Tensor]], keras.optimizers.Optimizer],
    schedule: LearningRate,
    step: tf.Variable,
    weight_decay: float | None = None,
) -> Group:
    """Builds a group and its optimizer, in the caller's strategy scope.

    Args:
      name: name of the group.
      variables: the variables to update.
      build: builds an optimizer from a function without arguments that returns the learning rate.
      schedule: the learning rate at each step of the run.
      step: the step counter of the run. All groups read their learning rates at this step and not
        at their optimizers' own counters.
      weight_decay: decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101): each step
        subtracts this factor times the learning rate times the weight. Biases and scales are
        excluded, see `is_kernel`. None keeps the optimizer's default: 0.004 for
        AdamW, no decay for the others.

    Raises:
      UserError: the optimizer is none of Keras, does not use the learning rate, or scales the loss
        or averages the weights itself.
    """
    is_read = False

    def learning_rate() -> tf.Tensor:
        nonlocal is_read
        is_read = True
        return schedule(step)

    optimizer = build(learning_rate)
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise UserError(
            f"the optimizer of the group {name!r} is {optimizer!r}; expected an object of a "
            "subclass of keras.optimizers.Optimizer"
        )
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise UserError(
            f"the optimizer of the group {name!r} is a LossScaleOptimizer, but the training step "
            "scales the loss itself; return its inner optimizer, and give --precision=float16"
        )
    unused = None
    if optimizer.loss_scale_factor:
        unused = "loss_scale_factor", "--precision=float16"
    if optimizer.use_ema and not optimizer.ema_overwrite_frequency:
        unused = "use_ema", "--weight_averaging, or also set ema_overwrite_frequency"
    if unused:
        option, instead = unused
        raise UserError(
            f"the optimizer of the group {name!r} has {option}={getattr(optimizer, option)}, which "
            f"the training step does not take into account; leave it out, and give {instead}"
        )
    is_read = False  # also if the optimizer was built with the rate of the first step
    _ = optimizer.learning_rate  # calls the function, if the optimizer keeps it
    if not is_read:
        raise UserError(
            f"the optimizer of the group {name!r} does not use the learning rate that it is given, "
            "so that schedules would have no effect; pass it on to the Keras optimizer"
        )
    optimizer.name = f"{name}_{optimizer.name}"
    if weight_decay is not None:
        optimizer.weight_decay = weight_decay or None
    excluded = [variable for variable in variables if not is_kernel(variable)]
    if excluded:
        own = getattr(optimizer, "_exclude_from_weight_decay_pattern", None)  # of a user's file
        optimizer.exclude_from_weight_decay(excluded, [own.pattern] if own else None)
    optimizer.build(list(variables))
    # The gradients are already summed over the replicas, because clipping needs their norm over all
    # groups. Keras must not sum them again.
    optimizer._all_reduce_sum_gradients = lambda gradients_and_variables: gradients_and_variables
    return Group(name, tuple(variables), optimizer, schedule)


def check_partition(groups: Sequence[Group], trainable: Sequence[keras.Variable]) -> None:
    """Raises ValueError unless the groups contain each trainable variable once, and no others."""
    owners: dict[int, list[str]] = {id(variable): [] for variable in trainable}
    for group in groups:
        for variable in group.variables:
            if id(variable) not in owners:
                raise ValueError(f"{variable.path} is in group {group.name}, but is not trainable")
            owners[id(variable)].append(group.name)
    for variable in trainable:
        names = owners[id(variable)]
        if len(names) != 1:
            found = f"in {' and '.join(names)}" if names else "in no group"
            raise ValueError(f"{variable.path} is {found}; expected exactly one group")


def penalties(
    variables: Sequence[keras.Variable],
) -> tuple[tf.Tensor, list[tf.Tensor | None]]:
    """Returns the sum of the regularizers and its gradients; None for variables without one.

    A penalty does not depend on photos, so it is added once, not per device or part of a batch.
    """
    values = [variable.value for variable in variables]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(values)
        penalties = [
            tf.cast(variable.regularizer(variable.value), tf.float32)
            for variable in variables
            if variable.regularizer is not None
        ]
        penalty = tf.add_n([tf.zeros([]), *penalties])
    return penalty, tape.gradient(penalty, values)
