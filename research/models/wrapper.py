"""`Wrapper`: a backbone with pooling and a new head. Selects the variables to train."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from research.system.errors import UserError
from research.tasks.task import Task


class Wrapper(keras.Model):
    """Classifies photos with a backbone, pooling, and a new head that returns float32 logits.

    Args:
      base_model: a Keras model that maps images to features (batch, height, width, channels).
      num_classes: number of classes if `class_names` is not given, at least 2.
      seed: seed of the head's initial weights.
      task: builds pooling and head. Default: global average pooling and one dense layer.
      class_names: names in the order of the labels. Default: `num_classes` numbers.

    Attributes:
      feature_shape: shape of the head's input for one photo.
      logits: number of logits for one photo.

    Raises:
      UserError: if there are fewer than 2 classes, if the task does not return two layers, if its
        pooling has weights, if a layer adds a penalty of its outputs to the loss, if the task has
        variables outside of the head, or if the shape or dtype of the head's output is not that of
        logits for these classes.
    """

    def __init__(
        self,
        base_model: keras.Model,
        num_classes: int = 2,
        seed: int = 0,
        task: Task | None = None,
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__(name="wrapper")
        names = class_names or tuple(map(str, range(num_classes)))
        if len(names) < 2:
            raise UserError(
                f"the only class name is {names[0]!r}; expected at least two; also a task that "
                "predicts a number needs two, and may ignore them"
            )
        task = task or Task()
        kind = f"the task {type(task).__name__}"
        self.backbone = base_model
        made = task.make_head(base_model.output_shape[1:], names, seed)
        if not _are_two_layers(made):
            raise UserError(
                f"{kind} returns {made!r} from make_head; expected two Keras layers, the pooling "
                "and the head; put several layers into a keras.Sequential"
            )
        self.pooling, self.head = made
        # Creates all variables here, in the caller's strategy scope, and not in the first step.
        image = keras.Input(base_model.output_shape[1:])
        pooled = self.pooling(image)
        logits = self.head(pooled, training=False)
        if not isinstance(logits, keras.KerasTensor):
            raise UserError(
                f"{kind} returns a head with several outputs; expected one tensor of logits: "
                "concatenate them"
            )
        self._check_parts(kind, pooled.shape)
        self.check_variables(task)
        self.built = True
        self.feature_shape: tuple[int, ...] = tuple(pooled.shape[1:])
        self.logits: int = logits.shape[-1]
        sizes = (1, 2) if len(names) == 2 else (len(names),)
        if len(logits.shape) != 2 or logits.shape[1] not in sizes or logits.dtype != "float32":
            raise UserError(
                f"{kind} returns a head with {logits.dtype} outputs {logits.shape}; expected "
                f"float32 (batch, {' or '.join(map(str, sizes))}): set the units of the last layer "
                'to the number of logits, and its dtype to "float32"'
            )

    def _check_parts(self, kind: str, pooled_shape: tuple[int, ...]) -> None:
        """Raises `UserError` for a pooling with weights, and for penalties that are not used."""
        if self.pooling.weights:
            raise UserError(
                f"{kind} returns a pooling with weights, but pooling is never trained; move layers "
                "with weights to the head"
            )
        shapes = (self.backbone.input_shape, self.backbone.output_shape, pooled_shape)
        for part, shape in zip((self.backbone, self.pooling, self.head), shapes, strict=True):
            found = penalty_of_outputs(part, shape[1:])
            if found:
                layer, penalty = found
                raise UserError(
                    f"the layer {layer.name!r} {penalty}, which is not used; add the penalty "
                    "to the losses of a task"
                )

    def check_variables(self, task: Task) -> None:
        """Raises `UserError` if a task or its head holds variables that are not trained.

        Layers of a task that are not in its head get their variables in the first call of `losses`.
        They are allowed if they are frozen, as a teacher is.
        """
        owned = {id(variable) for variable in self.head.variables}
        holders: dict[str, object] = {f"the task {type(task).__name__}": task}
        holders |= {f"the layer {one.name!r}": one for one in self.head._flatten_layers()}
        for holder, held in holders.items():
            for name, value in vars(held).items():
                # TensorFlow also lists the variables of a layer in attributes of its own.
                found = [] if name.startswith("_self_") else _variables(value)
                if any(id(variable) not in owned for variable in found):
                    raise UserError(
                        f"{holder} has variables in {name!r} that are neither trained nor saved; "
                        "create them with add_weight in a layer of the head; a layer that is not "
                        "trained, such as a teacher, needs trainable = False"
                    )

    def call(self, image: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Maps preprocessed images (batch, height, width, 3) to logits (batch, 1 or classes)."""
        features = self.pooling(self.backbone(image, training=training))
        return self.head(features, training=training)


def _are_two_layers(made: Any) -> bool:
    is_pair = isinstance(made, tuple) and len(made) == 2
    return is_pair and all(isinstance(one, keras.Layer) for one in made)


def _variables(value: object) -> Iterator[keras.Variable | tf.Variable]:
    """Yields variables, and the trainable ones of layers, also from a list or dictionary."""
    if isinstance(value, keras.Layer):
        yield from value.trainable_variables
    elif isinstance(value, (keras.Variable, tf.Variable)):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _variables(one)


def penalty_of_outputs(part: keras.Layer, shape: tuple[int, ...]) -> tuple[keras.Layer, str] | None:
    """Returns a layer that adds a penalty of its outputs to the loss, and how; or None.

    Args:
      part: a layer or model. If it has a layer whose code is neither in Keras nor in this package,
        it is called once with zeros, to find calls of `add_loss`. If this call fails, the calls
        before the failure are found.
      shape: shape of its input for one photo.
    """
    layers = part._flatten_layers()
    for layer in layers:
        if getattr(layer, "activity_regularizer", None) is not None:
            return layer, "has an activity_regularizer"
    if all(type(layer).__module__.split(".")[0] in ("keras", "research") for layer in layers):
        return None
    with keras.StatelessScope(collect_losses=True):
        with contextlib.suppress(Exception):  # a layer may need several, or other, examples
            part(tf.zeros((1, *shape)), training=True)
        for layer in layers:
            if layer._get_own_losses():
                return layer, "calls add_loss"
    return None


def freeze_below(backbone: keras.Model, index: int, bn_mode: str) -> None:
    """Freezes `backbone.layers[:index]` and makes the layers from `index` on trainable.

    Args:
      backbone: the model to change.
      index: the first trainable layer.
      bn_mode: mode of BatchNorm in trainable layers. `frozen` keeps statistics, scale and offset.
        `train` learns scale and offset and uses the statistics of each device's part of the batch;
        `sync` uses the statistics of the whole batch.
    """
    backbone.trainable = True
    for position, layer in enumerate(backbone.layers):
        layer.trainable = position >= index
        for inner in layer._flatten_layers():
            if isinstance(inner, keras.layers.BatchNormalization):
                inner.trainable = layer.trainable and bn_mode != "frozen"
                inner.synchronized = bn_mode == "sync"


def penalize(model: Wrapper, l2_penalty: float) -> None:
    """Adds `keras.regularizers.L2(l2_penalty)` to each trained kernel, unless it is 0.

    Other weights have no penalty, see `is_kernel`. A kernel with a regularizer of its own keeps it.
    """
    if l2_penalty:
        for variable in model.trainable_variables:
            if is_kernel(variable) and variable.regularizer is None:
                variable.regularizer = keras.regularizers.L2(l2_penalty)


def is_kernel(variable: keras.Variable) -> bool:
    """Returns whether a variable is more than one number per channel.

    Biases, scales and offsets of normalization layers, and scales of layers are not.
    """
    return math.prod(variable.shape[:-1]) > 1


@dataclasses.dataclass(frozen=True)
class PartSummary:
    """One row of the table of frozen and trained parts: numbers of layers and of parameters."""

    name: str
    layers: int
    parameters: int


def summarize_parts(model: Wrapper, index: int) -> tuple[PartSummary, ...]:
    """Counts layers and parameters of the frozen layers, the unfrozen layers and the head.

    Parameters that are not trained in unfrozen layers, such as those of a frozen BatchNorm, have a
    row of their own. The parameters add up to those of the model.
    """
    backbone = model.backbone
    layers, variables = backbone.layers, backbone.trainable_variables
    trained = sum(variable.value.shape.num_elements() for variable in variables)
    frozen = sum(layer.count_params() for layer in layers[:index])
    fixed = backbone.count_params() - trained - frozen
    return (
        PartSummary("frozen", index, frozen),
        PartSummary("backbone", len(layers) - index, trained),
        PartSummary("backbone, not trained", 0, fixed),
        PartSummary("head", 1, model.head.count_params()),
    )


def has_depthwise(model: keras.Model) -> bool:
    """Returns whether a model has depthwise convolutions."""
    return any(isinstance(one, keras.layers.DepthwiseConv2D) for one in model._flatten_layers())
