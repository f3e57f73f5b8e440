"""Computes blocks of layers again in the backward pass, instead of keeping their activations.

This is gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): only the activations between
the blocks are kept. It costs one more forward pass of all blocks except the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import keras
import tensorflow as tf


class Segment(NamedTuple):
    """Layers between two neighbouring places where a single tensor crosses.

    Attributes:
      output: the tensor at the end of the segment.
      size: the number of values that the layers compute for one photo.
    """

    output: keras.KerasTensor
    size: int


def cut_into_blocks(model: keras.Model) -> tuple[keras.Model, ...]:
    """Cuts a functional model where a single tensor crosses, such as after a residual block.

    Of these places it uses those with the smallest sum of the activations that are kept between
    blocks and those inside the largest block.

    Returns:
      Models that share the layers of the original and compute the same one after another: the
      first takes its inputs, the last returns its output. One model if no cut saves memory.
    """
    segments = _segments(model)
    whole = sum(segment.size for segment in segments)
    candidates = [_join(segments, whole / count) for count in range(1, len(segments) + 1)]
    blocks = min(candidates, key=_activations)
    if len(blocks) == 1:
        return (model,)
    first = model.inputs if len(model.inputs) > 1 else model.input
    starts = [first, *(block.output for block in blocks[:-1])]
    return tuple(
        keras.Model(start, block.output, name=f"{model.name}_block{index}")
        for index, (start, block) in enumerate(zip(starts, blocks, strict=True))
    )


def _segments(model: keras.Model) -> list[Segment]:
    # Layers may have nodes in other models too. Nodes run in order of decreasing depth.
    by_depth = model._nodes_by_depth
    nodes = [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth]]
    last_use = {
        id(tensor): position for position, node in enumerate(nodes) for tensor in node.input_tensors
    }
    last_use.update({id(tensor): len(nodes) for tensor in model.outputs})
    crossing = {id(tensor): tensor for tensor in model.inputs}
    segments, size = [], 0
    for position, node in enumerate(nodes):
        if node.is_input:
            continue
        crossing.update({id(tensor): tensor for tensor in node.output_tensors})
        crossing = {key: one for key, one in crossing.items() if last_use.get(key, 0) > position}
        size += sum(_values(tensor) for tensor in node.output_tensors)
        if len(crossing) == 1:
            segments.append(Segment(next(iter(crossing.values())), size))
            size = 0
    return segments


def _values(tensor: keras.KerasTensor) -> int:
    return math.prod(length or 1 for length in tensor.shape[1:])


def _join(segments: Iterable[Segment], limit: float) -> list[Segment]:
    """Joins neighbours to blocks of at most `limit` values, or one segment."""
    blocks: list[Segment] = []
    for output, size in segments:
        if blocks and blocks[-1].size + size <= limit:
            blocks[-1] = Segment(output, blocks[-1].size + size)
        else:
            blocks.append(Segment(output, size))
    return blocks


def _activations(blocks: Sequence[Segment]) -> int:
    """Returns the values that exist at once in the backward pass."""
    kept = sum(_values(block.output) for block in blocks[:-1])
    return kept + max(block.size for block in blocks)


def run_blocks(blocks: Sequence[keras.Model], inputs: Sequence[tf.Tensor]) -> tf.Tensor:
    """Runs blocks in training mode; all but the last run again in the backward pass.

    Random layers draw the same numbers again, and variables that a layer updates, such as the
    counters of these layers, are updated once.

    Args:
      blocks: see `cut_into_blocks`.
      inputs: of the first block.
    """
    activations = list(inputs)
    for block in blocks[:-1]:
        activations = [_run_recomputed(block, activations)]
    return _run(blocks[-1], activations)


def _run(block: keras.Model, inputs: Sequence[tf.Tensor]) -> tf.Tensor:
    # Keras expects a single input without a list.
    return block(inputs[0] if len(inputs) == 1 else list(inputs), training=True)


def _run_recomputed(block: keras.Model, inputs: Sequence[tf.Tensor]) -> tf.Tensor:
    trained, others = block.trainable_variables, block.non_trainable_variables
    variables = [*trained, *others]
    updated: list[keras.Variable] = []
    count = len(inputs)

    def compute(
        inputs: Sequence[tf.Tensor], values: Sequence[tf.Tensor]
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Returns the output, and the values of all variables afterwards."""
        scope = keras.StatelessScope(list(zip(variables, values, strict=True)))
        with scope:
            output = _run(block, inputs)
        return output, [scope.get_current_value(variable) for variable in variables]

    @tf.custom_gradient
    def run(*tensors: tf.Tensor) -> tuple[list[tf.Tensor], object]:
        inputs, values = tensors[:count], tensors[count:]
        output, after = compute(inputs, values)
        changed = [
            (variable, now)
            for variable, now, before in zip(variables, after, values, strict=True)
            if now is not before
        ]
        updated.extend(variable for variable, _ in changed)

        def gradient(slope: tf.Tensor, *_: tf.Tensor) -> list[tf.Tensor | None]:
            # Without the zero, TensorFlow or XLA would see that the second forward pass computes
            # the same as the first, and keep the activations of the first.
            again = [tensor + tf.cast(_zero_after(slope), tensor.dtype) for tensor in inputs]
            sources = [*again, *values[: len(trained)]]
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(sources)
                output = compute(again, values)[0]
            zero = tf.UnconnectedGradients.ZERO
            slopes = tape.gradient(output, sources, slope, unconnected_gradients=zero)
            return [*slopes, *[None] * len(others)]

        return [output, *(now for _, now in changed)], gradient

    values = [tf.convert_to_tensor(variable.value) for variable in variables]
    output, *updates = run(*inputs, *values)
    for variable, value in zip(updated, updates, strict=True):
        variable.assign(value)
    return output


def _zero_after(tensor: tf.Tensor) -> tf.Tensor:
    """Returns a scalar 0 that cannot be computed before the tensor; NaN if the tensor has NaN."""
    first = tf.reshape(tensor, [-1])[0]
    return tf.where(tf.math.is_finite(first), tf.zeros_like(first), first)
