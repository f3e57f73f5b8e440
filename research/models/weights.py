"""Loads a backbone's weights from a file: all of them or, with a reason, none.

What is read is numbers in HDF5, see `weights_file.py`. Two layouts are known:

- Keras 3 (`*.weights.h5`, and `model.weights.h5` inside a `.keras` archive; keras/src/saving/
  saving_lib.py): a group for each layer, called by its class and its number among the layers of
  that class, e.g. `layers/conv2d_1/vars/0`; a model inside a model is a group in a group.
- Keras 2 (`*_notop.h5` of keras.applications, and `model.save('x.h5')`; keras/src/legacy/saving/
  legacy_h5_format.py): the attribute `layer_names`, and `weight_names` for each layer; a model
  inside a model is one layer with many weights, whose order depends on what was frozen.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import h5py
import keras
import ml_dtypes
import numpy as np

from research.models.hdf5_file import LEAST_GROWTH, groups_and_arrays, open_weights
from research.system.errors import UserError


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did.

    Attributes:
      path: the file.
      loaded: how many of the model's variables were loaded.
      total: how many variables the model has; the same number, as loading is all or nothing.
      left_out: how many variables of layers in the file the model has no place for, such as the
        head's of a saved classifier.
    """

    path: str
    loaded: int
    total: int
    left_out: int

    def __str__(self) -> str:
        line = f"loaded {self.loaded} of {self.total} variables from {os.path.basename(self.path)}"
        return f"{line}, {self.left_out} others in it left out" if self.left_out else line


@dataclass(frozen=True)
class _Pair:
    """A layer of the model, and what a file holds for it; None: nothing."""

    layer: str
    variables: Sequence[keras.Variable]
    arrays: Sequence[h5py.Dataset] | None

    def problem(self) -> str | None:
        """Returns why the two do not fit, naming both; None if they do."""
        if self.arrays is None:
            return f"it has nothing for layer {self.layer!r}"
        wanted, found = len(self.variables), len(self.arrays)
        if wanted != found:
            return f"layer {self.layer!r} wants {wanted} variables, the file has {found}"
        for variable, array in zip(self.variables, self.arrays, strict=True):
            wants = f"layer {self.layer!r} wants {variable.name} {tuple(variable.shape)}"
            if tuple(variable.shape) != array.shape:
                return f"{wants}, the file has {array.shape}"
            if array.dtype.kind not in "fiu" and not _is_bfloat16(array):
                return f"{wants} of numbers, the file has type {array.dtype}"
            # HDF5 takes memory for a whole chunk, which may be larger than the array.
            size = array.dtype.itemsize
            if size * math.prod(array.chunks or ()) > max(4 * size * array.size, LEAST_GROWTH):
                return f"{wants}, the file has it in chunks of {array.chunks}"
        return None


def load_weights(model: keras.Model, path: str) -> LoadReport:
    """Loads a functional model's variables from a file, after all of it was checked.

    Args:
      model: a built functional model, such as a backbone.
      path: Keras weights (`*.weights.h5`, or HDF5 as Keras 2 wrote it), or a saved model (`.keras`,
        `.h5`) that is this model or contains it: as a model of its own, or layer by layer with
        more layers on top. What the file is, is seen from its content. A layer made of layers
        that is no model (such as MultiHeadAttention) is not looked for in Keras 3's layout.

    Returns:
      What was loaded.

    Raises:
      UserError: if the file is missing, is none of these, or does not hold every variable in the
        right shape; the model's variables are then unchanged.
    """
    with open_weights(
        path, 8 * sum(math.prod(variable.shape) for variable in model.weights)
    ) as file:
        groups, arrays = groups_and_arrays(file, path)
        prefix = _keras2_prefix(groups)
        if prefix is None:
            candidates, stored = _keras3_candidates(model, arrays)
        else:
            candidates, stored = _keras2_candidates(model, groups, arrays, prefix)
        pairs = _fitting(candidates, path)
        values = [
            (variable, _value(variable, array))
            for pair in pairs
            for variable, array in zip(pair.variables, pair.arrays or (), strict=True)
        ]
    for variable, value in values:
        variable.assign(value)
    for _, layer in _leaves(model):
        if isinstance(layer, keras.layers.Normalization):
            # This layer computes with constants that it derives from its variables once.
            layer.finalize_state()
    return LoadReport(path, len(values), len(model.weights), stored - len(values))


def _fitting(candidates: Iterable[list[_Pair]], path: str) -> list[_Pair]:
    """Returns the first candidate without a problem; raises `UserError` for the nearest one."""
    fewest: list[str] | None = None
    for pairs in candidates:
        problems = [problem for pair in pairs if (problem := pair.problem())]
        if not problems:
            return pairs
        if fewest is None or len(problems) < len(fewest):
            fewest = problems
    reason = fewest[0] if fewest else "it holds no layers of a Keras model"
    raise UserError(
        f"weights file {path} does not fit: {reason}; give a file of the same backbone, or "
        "--weights=none"
    )


def _value(variable: keras.Variable, array: h5py.Dataset) -> np.ndarray:
    """Returns what is stored, as the variable takes it; raises ValueError if it is not finite."""
    stored = np.asarray(array[()])
    if _is_bfloat16(array):
        stored = stored.view(ml_dtypes.bfloat16)
    with np.errstate(over="ignore"):
        value = stored.astype(variable.dtype)
    if not np.isfinite(value.astype(np.float64)).all():
        raise ValueError(f"{array.name} holds a value that is no finite {variable.dtype}")
    return value


def _is_bfloat16(array: h5py.Dataset) -> bool:
    # HDF5 has no such type: Keras writes two opaque bytes and says what they are.
    return array.dtype.itemsize == 2 and bool(array.attrs.get("dtype") == "bfloat16")


def _leaves(model: keras.Model, path: str = "") -> Iterator[tuple[str, keras.Layer]]:
    """Returns the layers with variables, models inside opened, each with its path in Keras 3."""
    used: Counter[str] = Counter()
    for layer in model.layers:
        kind = _snake_case(type(layer).__name__)
        name = f"{path}layers/{kind}_{used[kind]}" if used[kind] else f"{path}layers/{kind}"
        used[kind] += 1
        if isinstance(layer, keras.Model):
            yield from _leaves(layer, f"{name}/")
        elif layer.weights:
            yield name, layer


def _snake_case(name: str) -> str:
    """Returns a class's name as Keras writes it in paths and gives it to layers without a name."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _keras3_candidates(
    model: keras.Model, arrays: Mapping[str, h5py.Dataset]
) -> tuple[list[list[_Pair]], int]:
    """Returns a candidate for each model in the file, outermost first; and the number of
    variables."""
    layers: dict[str, dict[int, h5py.Dataset]] = {}
    roots: set[str] = set()
    for path, array in arrays.items():
        match = re.fullmatch(r"(.*layers/[^/]+)/vars/(\d+)", path)
        if match:
            layers.setdefault(match[1], {})[int(match[2])] = array
            parts = match[1].split("/")
            above = [parts[:i] for i, part in enumerate(parts) if part == "layers"]
            roots |= {"".join(f"{part}/" for part in root) for root in above}
    ordered = {path: [found[i] for i in sorted(found)] for path, found in layers.items()}
    leaves = list(_leaves(model))
    candidates = [
        [_Pair(layer.name, layer.weights, ordered.get(root + path)) for path, layer in leaves]
        for root in sorted(roots, key=lambda root: (root.count("/"), root))
    ]
    return candidates, sum(map(len, ordered.values()))


def _keras2_prefix(groups: Mapping[str, h5py.Group]) -> str | None:
    """Returns where a Keras 2 file has its layers: '', or in a saved model 'model_weights/'."""
    for name in ("", "model_weights"):
        if name in groups and _names(groups[name], "layer_names"):
            return f"{name}/" if name else ""
    return None


def _names(group: h5py.Group, attribute: str) -> list[str]:
    """Returns a list attribute; Keras 2 splits one over 64 KiB into `name0`, `name1`, ..."""
    numbered = (f"{attribute}{n}" for n in itertools.count())
    split = itertools.takewhile(lambda name: name in group.attrs, numbered)
    chunks = [attribute] if attribute in group.attrs else split
    values = [value for chunk in chunks for value in group.attrs[chunk]]
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values]


def _keras2_candidates(
    model: keras.Model,
    groups: Mapping[str, h5py.Group],
    arrays: Mapping[str, h5py.Dataset],
    prefix: str,
) -> tuple[list[list[_Pair]], int]:
    """Returns the candidates by order, which is Keras's own rule, then by the layers' names for a
    model inside a model; and the number of variables."""
    layers: dict[str, list[h5py.Dataset]] = {}
    leaves: dict[str, dict[str, list[h5py.Dataset]]] = {}
    for layer in _names(groups[prefix.rstrip("/")], "layer_names"):
        group = groups.get(prefix + layer)
        for weight in _names(group, "weight_names") if group is not None else ():
            array = arrays.get(f"{prefix}{layer}/{weight}")
            if array is not None:
                # 'Conv1/kernel:0' is the kernel of Conv1, be that a layer in a model in the file.
                leaf = weight.split("/")[-2] if "/" in weight else layer
                layers.setdefault(layer, []).append(array)
                leaves.setdefault(layer, {}).setdefault(leaf, []).append(array)
    whole = {leaf: found for inner in leaves.values() for leaf, found in inner.items()}
    scopes = [*(inner for inner in leaves.values() if len(inner) > 1), whole]
    tops = [layer for layer in model.layers if layer.weights]
    by_order = [
        _Pair(layer.name, layer.trainable_weights + layer.non_trainable_weights, found)
        for layer, found in zip(tops, [*layers.values(), *([None] * len(tops))], strict=False)
    ]
    candidates = [by_order, *(_by_name(model, scope) for scope in scopes)]
    return candidates, sum(map(len, layers.values()))


def _by_name(model: keras.Model, stored: Mapping[str, Sequence[h5py.Dataset]]) -> list[_Pair]:
    layers = [layer for _, layer in _leaves(model)]
    kinds = {_snake_case(type(layer).__name__) for layer in layers}
    wanted = _comparable([layer.name for layer in layers], kinds)
    found = dict(zip(_comparable(list(stored), kinds), stored.values(), strict=True))
    return [
        _Pair(layer.name, layer.weights, found.get(name))
        for layer, name in zip(layers, wanted, strict=True)
    ]


def _comparable(names: Sequence[str], kinds: set[str]) -> list[str]:
    """Renumbers the names that Keras gave: 'conv2d_94', if first of its kind, is 'conv2d #0'."""
    numbered: dict[str, list[int]] = {}
    parsed = [re.fullmatch(r"(.+?)(?:_(\d+))?", name) for name in names]
    kinds_and_numbers = [(m[1], int(m[2] or 0)) if m else ("", 0) for m in parsed]
    for kind, number in kinds_and_numbers:
        numbered.setdefault(kind, []).append(number)
    return [
        f"{kind} #{sorted(numbered[kind]).index(number)}" if kind in kinds else name
        for name, (kind, number) in zip(names, kinds_and_numbers, strict=True)
    ]
