"""Parameter groups, head and backbone, each with an optimizer and a schedule of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from research.optimization.schedules import LearningRate


@dataclasses.dataclass(frozen=True)
class Group:
    """Variables that one optimizer updates.

    Attributes:
      name: `head`, `backbone`, or `backbone_` and a stage where each stage has its own.
      variables: what is updated, in a fixed order.
      optimizer: built for exactly these variables.
      schedule: its learning rate by the run's step.
    """

    name: str
    variables: tuple[keras.Variable, ...]
    optimizer: keras.optimizers.Optimizer
    schedule: LearningRate

    @property
    def title(self) -> str:
        """The name as people see it: `backbone stage3`."""
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
    """Builds the optimizer of a group, under the caller's strategy scope.

    Args:
      name: of the group.
      variables: what it updates.
      build: makes an optimizer, given a function without arguments that returns its learning rate.
      schedule: its learning rate.
      step: the run's clock. The optimizer reads its rate from it, not from its own counter, so
        that all groups follow one clock.
      weight_decay: decoupled from the gradient (Loshchilov and Hutter 2019, arXiv 1711.05101): a
        step takes this times the learning rate off each weight. Biases and the scales and offsets
        of norms are spared. None for the optimizer's own: 0.004 for AdamW, none for the others.
    """

    def current_rate() -> tf.Tensor:
        return schedule(step)

    optimizer = build(current_rate)
    optimizer.name = f"{name}_{optimizer.name}"
    if weight_decay is not None:
        optimizer.weight_decay = weight_decay or None
    spared = [variable for variable in variables if len(variable.shape) < 2]
    if spared:
        optimizer.exclude_from_weight_decay(var_list=spared)
    optimizer.build(list(variables))
    # Keras would sum over the replicas once more. Ours are summed before, because their norm over
    # all groups has to be known first.
    optimizer._all_reduce_sum_gradients = _already_summed
    return Group(name, tuple(variables), optimizer, schedule)


def _already_summed(gradients_and_variables: Sequence) -> Sequence:
    return gradients_and_variables


def check_partition(groups: Sequence[Group], trainable: Sequence[keras.Variable]) -> None:
    """Raises ValueError unless each trainable variable is in exactly one group, and no other."""
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
