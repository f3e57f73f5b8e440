"""Finds the weights of a backbone in a file of timm or Hugging Face, for PyTorch.

The names of Hugging Face's transformers are first converted to those of timm. Each variable of the
backbone then has one tensor in the file, with its axes in another order. Supported are the vision
transformers, ConvNeXt, ConvNeXt V2 and MobileNetV4 in the table of backbones; the ResNets, for
example, have other strides in Keras than in PyTorch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import keras
import numpy as np

from research.models.safetensors_file import StoredTensor
from research.models.vision_transformer import POSITIONS, PREFIX

Replacements = tuple[tuple[str, str], ...]

# Layers of the table's networks, and the module of timm.
_MODULES: Replacements = (
    (r"patches", "patch_embed.proj"),
    (r"block(\d+)_(norm[12])", r"blocks.\1.\2"),
    (r"block(\d+)_(qkv|proj)", r"blocks.\1.attn.\2"),
    (r"block(\d+)_(fc[12])", r"blocks.\1.mlp.\2"),
    (r"block(\d+)_scale([12])", r"blocks.\1.ls\2"),
    (r"norm", "norm"),
    (r"convnext_[a-z]+_stem_conv", "stem.0"),
    (r"convnext_[a-z]+_stem_layernorm", "stem.1"),
    (r"convnext_[a-z]+_downsampling_layernorm_(\d)", r"stages.+\1.downsample.0"),
    (r"convnext_[a-z]+_downsampling_conv_(\d)", r"stages.+\1.downsample.1"),
    (r"convnext_[a-z]+_stage_(\d)_block_(\d+)_depthwise_conv", r"stages.\1.blocks.\2.conv_dw"),
    (r"convnext_[a-z]+_stage_(\d)_block_(\d+)_layernorm", r"stages.\1.blocks.\2.norm"),
    (
        r"convnext_[a-z]+_stage_(\d)_block_(\d+)_pointwise_conv_(\d)",
        r"stages.\1.blocks.\2.mlp.fc\3",
    ),
    (r"convnext_[a-z]+_stage_(\d)_block_(\d+)_layer_scale", r"stages.\1.blocks.\2"),
    # The normalization of ConvNeXt's output, whose name Keras generates.
    (r"layer_normalization(_\d+)?", "head.norm"),
    # ConvNeXt V2.
    (r"stem_patches", "stem.0"),
    (r"stem_norm", "stem.1"),
    (r"stage(\d)_downsample_norm", r"stages.\1.downsample.0"),
    (r"stage(\d)_downsample_conv", r"stages.\1.downsample.1"),
    (r"stage(\d)_block(\d+)_(conv_dw|norm)", r"stages.\1.blocks.\2.\3"),
    (r"stage(\d)_block(\d+)_(fc[12]|grn)", r"stages.\1.blocks.\2.mlp.\3"),
    (r"head_norm", "head.norm"),
    # MobileNetV4.
    (r"(conv_stem|conv_head|norm_head)", r"\1"),
    (r"bn_stem", "bn1"),
    (r"stage(\d)_block(\d+)_(conv|conv_exp|conv_pwl|bn[12])", r"blocks.\1.\2.\3"),
    (r"stage(\d)_block(\d+)_(dw_start|pw_exp|dw_mid|pw_proj)_(conv|bn)", r"blocks.\1.\2.\3.\4"),
)
# Modules of Hugging Face's transformers, and those of timm.
_HUGGING_FACE: Replacements = (
    (r"embeddings\.(cls_token|mask_token)", r"\1"),
    (r"(embeddings\.)?register_tokens", "reg_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.distillation_token", "dist_token"),
    (r"embeddings\.patch_embeddings\.projection\.(.*)", r"patch_embed.proj.\1"),
    (
        r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(.*)",
        r"blocks.\1.attn.\2.\3",
    ),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(.*)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.(.*)", r"blocks.\1.mlp.fc1.\2"),
    (r"encoder\.layer\.(\d+)\.output\.dense\.(.*)", r"blocks.\1.mlp.fc2.\2"),
    (r"encoder\.layer\.(\d+)\.layernorm_before\.(.*)", r"blocks.\1.norm1.\2"),
    (r"encoder\.layer\.(\d+)\.layernorm_after\.(.*)", r"blocks.\1.norm2.\2"),
    (r"encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layer\.(\d+)\.(.*)", r"blocks.\1.\2"),
    (r"embeddings\.patch_embeddings\.(weight|bias)", r"stem.0.\1"),
    (r"embeddings\.layernorm\.(.*)", r"stem.1.\1"),
    (r"encoder\.stages\.(\d)\.downsampling_layer\.(.*)", r"stages.\1.downsample.\2"),
    (r"encoder\.stages\.(\d)\.layers\.(\d+)\.dwconv\.(.*)", r"stages.\1.blocks.\2.conv_dw.\3"),
    (r"encoder\.stages\.(\d)\.layers\.(\d+)\.layernorm\.(.*)", r"stages.\1.blocks.\2.norm.\3"),
    (r"encoder\.stages\.(\d)\.layers\.(\d+)\.pwconv(\d)\.(.*)", r"stages.\1.blocks.\2.mlp.fc\3.\4"),
    (r"encoder\.stages\.(\d)\.layers\.(\d+)\.layer_scale_parameter", r"stages.\1.blocks.\2.gamma"),
    (r"encoder\.stages\.(\d)\.layers\.(\d+)\.(.*)", r"stages.\1.blocks.\2.mlp.\3"),
)
# What a backbone does not need: classifiers, the token of masked patches, and counters.
_HEADS = re.compile(
    r"(head|fc|classifier|cls_classifier|distillation_classifier|pooler|pre_logits)\..*|mask_token"
    r"|.*\.num_batches_tracked"
)
_PARAMETERS = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


class DoesNotFitError(ValueError):
    """A file does not have the weights of the backbone; the message says why, without the file."""


@dataclass(frozen=True)
class Part:
    """The tensors of a file from which a variable is made.

    Attributes:
      shape: the shape that the variable will get.
      read: returns the values, in this shape.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def torch_parts(
    leaves: Sequence[keras.Layer], stored: Mapping[str, StoredTensor]
) -> tuple[list[tuple[keras.Variable, Part]], int]:
    """Finds the values of all variables of a backbone in a file, without reading them.

    Args:
      leaves: the layers of the backbone that have variables, also those in nested models.
      stored: the tensors of the file by name, with the names of timm or of Hugging Face.

    Returns:
      The variables with their parts, and the number of tensors that are not used, such as those of
      a classifier.

    Raises:
      DoesNotFitError: if a variable has no tensor or one of another shape, or if the file has
        tensors that belong to another network.
    """
    named = _timm_names(stored)
    try:
        return _find_parts(leaves, named)
    except DoesNotFitError as error:
        raise DoesNotFitError(f"{error}{_looks_like(named)}") from error


def _find_parts(
    leaves: Sequence[keras.Layer], named: Mapping[str, StoredTensor]
) -> tuple[list[tuple[keras.Variable, Part]], int]:
    parts = {name: Part(tensor.shape, tensor.read) for name, tensor in named.items()}
    _join_query_key_value(parts)
    found: list[tuple[keras.Variable, Part]] = []
    used: set[str] = set()
    for layer in leaves:
        for variable in layer.weights:
            names, part = _part_of(layer, variable, parts)
            used |= names
            if part.shape != tuple(variable.shape):
                raise DoesNotFitError(
                    f"layer {layer.name!r} needs {variable.name} {tuple(variable.shape)}, the file "
                    f"has {part.shape}"
                )
            found.append((variable, part))
    foreign = [name for name in parts if name not in used and not _HEADS.fullmatch(name)]
    if foreign:
        raise DoesNotFitError(f"it has {foreign[0]!r}, which this backbone does not have")
    wrong = [name for name in named if named[name].dtype.kind not in "fV"]
    if wrong := [name for name in wrong if not _HEADS.fullmatch(name)]:
        raise DoesNotFitError(f"{wrong[0]!r} is stored as {named[wrong[0]].dtype}, not as floats")
    return found, len(parts.keys() - used)


def _timm_names(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Returns the tensors under the names of timm."""
    is_convnext = any("encoder.stages." in name for name in stored)
    layernorm = "head.norm" if is_convnext else "norm"
    named: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        new = re.sub(r"\A(vit|deit|dinov2|dinov2_with_registers|convnext|convnextv2)\.", "", name)
        new = _replaced(new, _HUGGING_FACE) or new
        new = re.sub(r"\Alayernorm\.", f"{layernorm}.", new)
        if new in named:
            raise DoesNotFitError(f"it has two tensors for {new!r}")
        named[new] = tensor
    return named


def _replaced(name: str, rules: Replacements) -> str | None:
    """Applies the first rule that matches the whole name; returns None if none does."""
    for pattern, template in rules:
        if match := re.fullmatch(pattern, name):
            return match.expand(template)
    return None


def _join_query_key_value(parts: dict[str, Part]) -> None:
    """Replaces the three projections of an attention by one, as in timm."""
    for name in [name for name in parts if re.fullmatch(r"blocks\.\d+\.attn\.query\.\w+", name)]:
        names = [name.replace(".query.", f".{one}.") for one in ("query", "key", "value")]
        three = [parts.pop(one) for one in names if one in parts]
        if len(three) < 3 or len({part.shape for part in three}) > 1 or not three[0].shape:
            raise DoesNotFitError(f"{name!r} has no key and value of the same shape")
        shape = (3 * three[0].shape[0], *three[0].shape[1:])
        parts[name.replace(".query.", ".qkv.")] = Part(shape, _joined(three))


def _joined(parts: list[Part]) -> Callable[[], np.ndarray]:
    return lambda: np.concatenate([part.read() for part in parts])


def _part_of(
    layer: keras.Layer, variable: keras.Variable, parts: Mapping[str, Part]
) -> tuple[set[str], Part]:
    """Returns the names of the tensors of a variable, and the part that it is made from."""
    if layer.name in (PREFIX, POSITIONS):
        return _table(layer.name, tuple(variable.shape), parts)
    module = _replaced(layer.name, _MODULES)
    if module is None:
        raise DoesNotFitError(
            "safetensors files are only read for vision transformers, ConvNeXt and MobileNetV4"
        )
    # Keras counts the downsampling layers from 0, timm the stages that begin with them from 1.
    module = re.sub(r"\+(\d)", lambda match: str(int(match[1]) + 1), module)
    is_scale = isinstance(layer, keras.layers.DepthwiseConv1D) or "layer_scale" in layer.name
    name = f"{module}.{'gamma' if is_scale else _PARAMETERS.get(variable.name, variable.name)}"
    if name not in parts:
        raise DoesNotFitError(f"it has no {name!r} for layer {layer.name!r}")
    return {name}, _in_order_of_keras(parts[name], tuple(variable.shape))


def _in_order_of_keras(part: Part, wanted: tuple[int, ...]) -> Part:
    """Returns a part with its axes in the order of Keras: (height, width, inputs, outputs)."""
    count = math.prod(part.shape)
    if max((*part.shape, 1)) == max((*wanted, 1)) == count == math.prod(wanted):
        # One number per channel, as of a scale, which PyTorch and Hugging Face store differently.
        return Part(wanted, lambda: part.read().reshape(wanted))
    if len(wanted) == 2 and part.shape[2:] == (1, 1):  # a dense layer, stored as a convolution
        return Part(part.shape[1::-1], lambda: part.read()[:, :, 0, 0].T)
    axes = (2, 3, 1, 0) if len(part.shape) == 4 else tuple(reversed(range(len(part.shape))))
    if len(wanted) == 4 and wanted[3] == 1:  # a depthwise convolution: (height, width, channels, 1)
        axes = (2, 3, 0, 1)
    return Part(tuple(part.shape[axis] for axis in axes), lambda: part.read().transpose(axes))


def _table(layer: str, wanted: tuple[int, ...], parts: Mapping[str, Part]) -> tuple[set[str], Part]:
    """Returns the position embeddings of the patches, or the learned tokens in front of them.

    A position embedding of such a token is added to the token: only their sum is used.
    """
    for name in ("cls_token", "pos_embed"):
        if name not in parts:
            raise DoesNotFitError(f"it has no {name!r}")
        if len(parts[name].shape) != 3 or parts[name].shape[0] != 1:
            raise DoesNotFitError(f"{name!r} has the shape {parts[name].shape}")
    names = [name for name in ("cls_token", "reg_token") if name in parts]
    count = sum(parts[name].shape[1] for name in names)
    positions, width = parts["pos_embed"].shape[1:]
    # Networks for square photos have a square number of patches, and 0, 1 or `count` others.
    extra = next(
        (n for n in (0, 1, count) if math.isqrt(max(positions - n, 0)) ** 2 == positions - n), 0
    )
    if layer == POSITIONS:
        shape = positions - extra, width
        return {"pos_embed"}, Part(shape, lambda: parts["pos_embed"].read()[0, extra:])

    def tokens() -> np.ndarray:
        values = [parts[name].read()[0].astype(np.float32) for name in names]
        table = np.concatenate(values)
        table[:extra] += parts["pos_embed"].read()[0, :extra].astype(np.float32)
        return table

    return set(names), Part((count, width), tokens)


def _looks_like(named: Mapping[str, StoredTensor]) -> str:
    """Returns what kind of network a file has, after a semicolon; '' if it is not known."""

    def count(pattern: str) -> int:
        return len({match[1] for name in named if (match := re.match(pattern, name))})

    def shape(name: str) -> tuple[int, ...]:
        return named[name].shape if name in named else ()

    text = ""
    if blocks := count(r"blocks\.(\d+)\.attn\."):
        text = f"a vision transformer of {blocks} blocks"
        if len(kernel := shape("patch_embed.proj.weight")) == 4:
            text += f" of width {kernel[0]}, for patches of {kernel[2]} pixels"
        text += ", distilled" if "dist_token" in named else ""
        text += ", with registers" if "reg_token" in named else ""
        text += ", with scaled branches" if "blocks.0.ls1.gamma" in named else ""
    elif "stages.0.blocks.0.conv_dw.weight" in named:
        depths = [count(rf"stages\.{stage}\.blocks\.(\d+)\.") for stage in range(4)]
        version = "V2" if any(".grn." in name for name in named) else ""
        text = f"a ConvNeXt{version} of {', '.join(map(str, depths))} blocks"
    elif "blocks.0.0.conv.weight" in named or "blocks.0.0.conv_exp.weight" in named:
        depths = [count(rf"blocks\.{stage}\.(\d+)\.") for stage in range(5)]
        text = f"a MobileNetV4 of {', '.join(map(str, depths))} blocks"
    elif (
        "layer1.0.conv1.weight" in named
        or "encoder.stages.0.layers.0.layer.0.convolution.weight" in named
    ):
        text = "a ResNet of PyTorch, whose strides differ from Keras's"
    return f"; it looks like {text}" if text else ""
