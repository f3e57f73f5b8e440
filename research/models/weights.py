"""Loads the weights of a backbone from a file: all of them, or none.

`safetensors_file.py` opens files for PyTorch, and `torch_weights.py` finds the weights in them.
`hdf5_file.py` opens all others. Two layouts are supported in HDF5:

- Keras 3 (`*.weights.h5`, and `model.weights.h5` inside a `.keras` archive; keras/src/saving/
  saving_lib.py): one group per layer, named after the layer's class and its number among the layers
  of this class, for example `layers/conv2d_1/vars/0`. A nested model is a nested group.
- Keras 2 (`*_notop.h5` of keras.applications, and `model.save('x.h5')`; keras/src/legacy/saving/
  legacy_h5_format.py): the attribute `layer_names`, and `weight_names` for each layer. A nested
  model is one layer with many weights, whose order depends on which layers were frozen.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import keras
import ml_dtypes
import numpy as np

from research.models.hdf5_file import ALLOWED_BYTES, open_weights
from research.models.safetensors_file import is_safetensors, read_safetensors
from research.models.torch_weights import DoesNotFitError, torch_parts
from research.system.errors import UserError, one_line

# Of one kind that the backbone does not have.
MAX_HEAD_LAYERS = 4

Values = list[tuple[keras.Variable, np.ndarray]]


@dataclass(frozen=True)
class LoadReport:
    """The result of `load_weights`.

    Attributes:
      path: the file.
      loaded: number of variables of the model that were loaded.
      total: number of variables of the model; equal to `loaded`, because all or none are loaded.
      left_out: number of variables in the file that the model does not have, for example those of
        the head of a saved classifier.
    """

    path: str
    loaded: int
    total: int
    left_out: int

    def __str__(self) -> str:
        line = f"loaded {self.loaded} of {self.total} variables from {os.path.basename(self.path)}"
        return f"{line}, ignored {self.left_out} others in it" if self.left_out else line


@dataclass(frozen=True)
class _Pair:
    """A layer of the model and its arrays in a file; None if the file has none for it."""

    layer: str
    variables: Sequence[keras.Variable]
    arrays: Sequence[h5py.Dataset] | None

    def problem(self) -> str | None:
        """Returns why the arrays do not fit the variables; None if they do."""
        if self.arrays is None:
            return f"it has no weights for layer {self.layer!r}"
        needed, found = len(self.variables), len(self.arrays)
        if needed != found:
            return f"layer {self.layer!r} needs {needed} variables, the file has {found}"
        for variable, array in zip(self.variables, self.arrays, strict=True):
            needs = f"layer {self.layer!r} needs {variable.name} {tuple(variable.shape)}"
            if tuple(variable.shape) != array.shape:
                return f"{needs}, the file has {array.shape}"
            if array.dtype.kind not in "fiu" and not _is_bfloat16(array):
                return f"{needs} as numbers, the file has type {array.dtype}"
            # HDF5 allocates memory for a whole chunk, which may be larger than the array.
            size = array.dtype.itemsize
            if size * math.prod(array.chunks or ()) > max(4 * size * array.size, ALLOWED_BYTES):
                return f"{needs}, the file has it in chunks of {array.chunks}"
        return None


@dataclass(frozen=True)
class _Candidate:
    """A part of a file that may hold the weights of the model.

    Attributes:
      pairs: for each layer of the model.
      stored: the arrays of each layer in this part of the file, by name, in the order of the
        layers. Empty if the file does not keep this order.
      foreign: why the layers that are left out belong to another network; '' if they may not.
    """

    pairs: list[_Pair]
    stored: Mapping[str, Sequence[h5py.Dataset]]
    foreign: str = ""

    def problems(self) -> list[str]:
        """Returns why this part of the file does not fit the model; an empty list if it does."""
        found = [problem for pair in self.pairs if (problem := pair.problem())]
        return found or ([self.foreign] if self.foreign else self._gap())

    def _gap(self) -> list[str]:
        """Names a layer that the model does not have, between layers that it has."""
        needed = {id(pair.arrays) for pair in self.pairs}
        layers = [(name, id(arrays) in needed) for name, arrays in self.stored.items()]
        used = [index for index, (_, is_used) in enumerate(layers) if is_used]
        for name, is_used in layers[used[0] : used[-1]] if used else ():
            if not is_used:
                return [
                    f"it has the layer {name!r} between layers of this backbone, as a deeper "
                    "network does"
                ]
        return []


def load_weights(model: keras.Model, path: str) -> LoadReport:
    """Loads the variables of a functional model from a file, after checking the whole file.

    Args:
      model: a built functional model, such as a backbone.
      path: Keras weights (`*.weights.h5`, or HDF5 of Keras 2), a saved model (`.keras`, `.h5`), or
        weights of timm or Hugging Face (`.safetensors`).
        A saved model is either this model or contains it, as a nested model or as layers that
        follow each other.
        The content decides the format, not the name. In the layout of Keras 3, layers that consist
        of layers but are not models, such as MultiHeadAttention, are not supported.

    Returns:
      The numbers of loaded and ignored variables.

    Raises:
      UserError: if the file does not exist, has another format, or does not contain every variable
        in the right shape. The variables of the model are then unchanged.
    """
    read = _torch_values if is_safetensors(path) else _keras_values
    values, left_out = read(model, path)
    for variable, value in values:
        variable.assign(value)
    for _, layer in _leaves(model):
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()  # computes the constants that the layer uses
    return LoadReport(path, len(values), len(model.weights), left_out)


def _keras_values(model: keras.Model, path: str) -> tuple[Values, int]:
    """Returns the values of all variables, and the number of other variables in an HDF5 file."""
    size = sum(math.prod(variable.shape) for variable in model.weights)
    with open_weights(path, 8 * size) as (groups, arrays):
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
    return values, stored - len(values)


def _torch_values(model: keras.Model, path: str) -> tuple[Values, int]:
    """Returns the values of all variables, and the number of tensors that are not used."""
    stored = read_safetensors(path)
    try:
        parts, left_out = torch_parts([layer for _, layer in _leaves(model)], stored)
        return [
            (one, _finite(one, part.read(), f"the tensor of {one.path}")) for one, part in parts
        ], left_out
    except DoesNotFitError as error:
        raise _misfit(path, str(error)) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"weights file {path} cannot be read ({one_line(error)}); give another file"
        ) from error


def _fitting(candidates: Iterable[_Candidate], path: str) -> list[_Pair]:
    """Returns the first candidate that fits; otherwise raises `UserError` for the closest one."""
    problems = ["it contains no layers of a Keras model"]
    for number, candidate in enumerate(candidates):
        found = candidate.problems()
        if not found:
            return candidate.pairs
        if number == 0 or len(found) < len(problems):
            problems = found
    raise _misfit(path, problems[0])


def _misfit(path: str, problem: str) -> UserError:
    return UserError(
        f"weights file {path} does not fit: {problem}; give a file of the same backbone, or "
        "--weights=none"
    )


def _value(variable: keras.Variable, array: h5py.Dataset) -> np.ndarray:
    """Returns an array in the dtype of the variable; raises ValueError if it is not finite."""
    stored = np.asarray(array[()])
    if _is_bfloat16(array):
        stored = stored.view(ml_dtypes.bfloat16)
    return _finite(variable, stored, array.name)


def _finite(variable: keras.Variable, stored: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        value = stored.astype(variable.dtype)
    if not np.isfinite(value.astype(np.float64)).all():
        raise ValueError(f"{name} contains a value that is not a finite {variable.dtype}")
    return value


def _is_bfloat16(array: h5py.Dataset) -> bool:
    # HDF5 has no bfloat16: Keras writes two opaque bytes, and the type in an attribute.
    return array.dtype.itemsize == 2 and bool(array.attrs.get("dtype") == "bfloat16")


def _leaves(model: keras.Model, path: str = "") -> Iterator[tuple[str, keras.Layer]]:
    """Yields each layer with variables, also in nested models, and its path in a Keras 3 file."""
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
    """Converts a class name as Keras does for paths and for layers without a name."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _keras3_candidates(
    model: keras.Model, arrays: Mapping[str, h5py.Dataset]
) -> tuple[list[_Candidate], int]:
    """Returns a candidate for each model in the file, outermost first, and the variable count.

    The model's layers of a class are the first ones of this class in the file, so that no layer of
    the same class is left out between them.
    """
    layers: dict[str, dict[int, h5py.Dataset]] = {}
    roots: set[str] = set()
    for path, array in arrays.items():
        match = re.fullmatch(r"(.*layers/[^/]+)/vars/(\d+)", path)
        if match:
            layers.setdefault(match[1], {})[int(match[2])] = array
            ends = [found.start() for found in re.finditer(r"(?<![^/])layers(?![^/])", match[1])]
            roots |= {match[1][:end] for end in ends}
    ordered = {path: [found[i] for i in sorted(found)] for path, found in layers.items()}
    leaves = list(_leaves(model))
    candidates = [
        _Candidate(
            [_Pair(layer.name, layer.weights, ordered.get(root + path)) for path, layer in leaves],
            {},
            _foreign_kind(root, ordered, {path for path, _ in leaves}),
        )
        for root in sorted(roots, key=lambda root: (root.count("/"), root))
    ]
    return candidates, sum(map(len, ordered.values()))


def _foreign_kind(root: str, stored: Iterable[str], paths: set[str]) -> str:
    """Names a kind of layer that a part of a Keras 3 file has often, and the model not at all.

    The file does not tell where these layers are. A head has only a few layers.

    Args:
      root: the path of this part.
      stored: the paths of all layers in the file.
      paths: the paths of the model's layers, below the root.

    Returns:
      The problem; '' if there is none.
    """

    def kind(path: str) -> str:
        return re.sub(r"_\d+\Z", "", path)

    inner = (path[len(root) :] for path in stored if path.startswith(root))
    counts = Counter(kind(path) for path in inner if path.count("/") == 1)
    known = {kind(path) for path in paths}
    for name, count in counts.items():
        if name not in known and count > MAX_HEAD_LAYERS:
            text = name.removeprefix("layers/")
            return f"it has {count} layers of the kind {text!r}, which this backbone does not have"
    return ""


def _keras2_prefix(groups: Mapping[str, h5py.Group]) -> str | None:
    """Returns the path of the layers in a Keras 2 file: '', or 'model_weights/' in a model."""
    for name in ("", "model_weights"):
        if name in groups and _names(groups[name], "layer_names"):
            return f"{name}/" if name else ""
    return None


def _names(group: h5py.Group, attribute: str) -> list[str]:
    """Returns a list attribute; Keras 2 splits a list over 64 KiB into `name0`, `name1`, ..."""
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
) -> tuple[list[_Candidate], int]:
    """Returns the candidates and the number of variables in the file.

    Layers are matched by name, in the whole file and in each nested model. If the file has other
    names, its layers are matched by order, as Keras does.
    """
    layers: dict[str, list[h5py.Dataset]] = {}
    leaves: dict[str, dict[str, list[h5py.Dataset]]] = {}
    for layer in _names(groups[prefix.rstrip("/")], "layer_names"):
        group = groups.get(prefix + layer)
        for weight in _names(group, "weight_names") if group is not None else ():
            array = arrays.get(f"{prefix}{layer}/{weight}")
            if array is not None:
                # 'Conv1/kernel:0' is the kernel of Conv1, which may be in a nested model.
                leaf = weight.split("/")[-2] if "/" in weight else layer
                layers.setdefault(layer, []).append(array)
                leaves.setdefault(layer, {}).setdefault(leaf, []).append(array)
    whole = {leaf: found for inner in leaves.values() for leaf, found in inner.items()}
    order = {name: place for place, name in enumerate(_layer_order(groups[""]))}
    scopes = [
        dict(sorted(scope.items(), key=lambda item: order.get(item[0], len(order))))
        for scope in (*(inner for inner in leaves.values() if len(inner) > 1), whole)
    ]
    tops = [layer for layer in model.layers if layer.weights]
    by_order = [
        _Pair(layer.name, layer.trainable_weights + layer.non_trainable_weights, found)
        for layer, found in zip(tops, [*layers.values(), *([None] * len(tops))], strict=False)
    ]
    candidates = [_Candidate(_by_name(model, scope), scope) for scope in scopes]
    has_all_names = all(pair.arrays for pair in candidates[-1].pairs)
    if len(layers) <= len(tops) and not has_all_names:
        candidates.insert(0, _Candidate(by_order, layers))
    return candidates, sum(map(len, layers.values()))


def _layer_order(root: h5py.Group) -> list[str]:
    """Returns the layers of a saved model in their order, nested ones too; [] if it is not known.

    Keras 2 lists the frozen weights of a nested model after its other weights, so that the order of
    its weights is not the order of its layers.
    """

    def names(config: Any) -> Iterator[str]:
        for layer in config["config"].get("layers", ()):
            yield layer["config"]["name"]
            yield from names(layer)

    try:
        return list(names(json.loads(root.attrs.get("model_config", "{}"))))
    except (AttributeError, KeyError, MemoryError, RecursionError, TypeError, ValueError):
        return []


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
    """Renumbers names that Keras generated: the first 'conv2d_94' of its kind is 'conv2d #0'."""
    bases = [re.sub(r"_\d+\Z", "", name) for name in names]
    numbers = [int(name[len(base) + 1 :] or 0) for name, base in zip(names, bases, strict=True)]
    parsed = list(zip(bases, numbers, strict=True))
    return [
        f"{base} #{sum(b == base and n < number for b, n in parsed)}" if base in kinds else name
        for name, (base, number) in zip(names, parsed, strict=True)
    ]
