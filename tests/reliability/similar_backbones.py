"""Checks that no backbone loads the weights of another one whose layers have the same names.

python -m tests.reliability.similar_backbones
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import h5py
import keras

from research.models.backbone import Backbone, build_backbone
from research.models.backbone_table import BACKBONES
from research.models.weights import load_weights
from research.system.errors import UserError

LEAST_SHARED = 0.5  # of the smaller network's layers


def write_layout(model: keras.Model, file: Path) -> None:
    """Writes a whole-model `.h5` file of Keras 2 whose arrays have their shapes, but no values."""
    with h5py.File(file, "w") as opened:
        root = opened.create_group("model_weights")
        layers = [layer for layer in model.layers if layer.weights]
        root.attrs["layer_names"] = [layer.name for layer in layers]
        for layer in layers:
            variables = layer.trainable_weights + layer.non_trainable_weights
            names = [f"{layer.name}/{variable.name}" for variable in variables]
            group = root.create_group(layer.name)
            group.attrs["weight_names"] = names
            for name, variable in zip(names, variables, strict=True):
                group.create_dataset(name, variable.shape, "float32")


def build(backbone: Backbone) -> keras.Model:
    """Builds a backbone without weights, at its smallest size."""
    return build_backbone(backbone, backbone.minimum_size, None)


def names_of(model: keras.Model) -> set[str]:
    """Returns the names of the layers with weights."""
    return {layer.name for layer in model.layers if layer.weights}


def check_group(backbones: Sequence[Backbone], folder: Path) -> tuple[int, list[str]]:
    """Loads each backbone's file into each other one that shares layer names with it.

    Returns:
      The number of pairs, and a line for each pair that loaded without an error.
    """
    models = {backbone.name: build(backbone) for backbone in backbones}
    for name, model in models.items():
        write_layout(model, folder / f"{name}.h5")
        load_weights(model, str(folder / f"{name}.h5"))  # its own file fits
    tried, loaded = 0, []
    for (name, model), (other, source) in itertools.permutations(models.items(), 2):
        names, others = names_of(model), names_of(source)
        if len(names & others) < LEAST_SHARED * min(len(names), len(others)):
            continue
        tried += 1
        try:
            report = load_weights(model, str(folder / f"{other}.h5"))
        except UserError:
            continue
        loaded.append(f"{name} {report}")
    return tried, loaded


def main() -> None:
    """Checks the families of the table."""
    tried, loaded = 0, []
    entries = sorted(BACKBONES.values(), key=lambda one: family_of(one.name))
    with tempfile.TemporaryDirectory() as folder:
        for family, members in itertools.groupby(entries, lambda one: family_of(one.name)):
            count, found = check_group(list(members), Path(folder))
            print(f"{family}: {count} pairs, {len(found)} loaded", flush=True)
            tried, loaded = tried + count, loaded + found
    print("\n".join([f"{tried} pairs, {len(loaded)} loaded", *loaded]))
    raise SystemExit(bool(loaded))


def family_of(name: str) -> str:
    """Returns the start of a backbone's name that its family shares, such as `ResNet`."""
    return next(
        family
        for family in (
            *("ResNet", "EfficientNet", "DenseNet", "ConvNeXtV2", "ConvNeXt", "VGG", "MobileNet"),
            *("NASNet", name),
        )
        if name.startswith(family)
    )


if __name__ == "__main__":
    main()
