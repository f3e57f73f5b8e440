"""Checks that each backbone can be cut at the start of each of its stages.

python -m tests.reliability.cuts_of_backbones                     # the whole table: hours
python -m tests.reliability.cuts_of_backbones --backbones NASNetMobile InceptionResNetV2

With frozen BatchNorm layers that are folded, trunk and rest together give the features of the whole
network.
"""

from __future__ import annotations

import argparse

import keras
import numpy as np
import tensorflow as tf

from research.models.backbone import Backbone, build_backbone, stage_starts
from research.models.backbone_table import BACKBONES
from research.models.split import split_backbone
from research.models.wrapper import freeze_below

TOLERANCE = 1e-4


def deviations(backbone: Backbone) -> dict[str, tuple[tuple[str, ...], float]]:
    """Returns the layers that cross the cut at each stage, and the relative deviation."""
    size = backbone.minimum_size
    model = build_backbone(backbone, size, None)
    random = np.random.default_rng(0)
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            for variable in layer.variables:
                is_scale = variable.name in ("gamma", "moving_variance")
                low, high = (0.5, 1.5) if is_scale else (-0.3, 0.3)
                variable.assign(random.uniform(low, high, variable.shape))
    freeze_below(model, 0, "frozen")
    photos = random.uniform(0, 255, (2, size, size, 3)).astype(np.float32)
    images = backbone.preprocessing(tf.constant(photos))
    wanted = model(images, training=False).numpy()
    found = {}
    for stage, start in stage_starts(model, backbone).items():
        parts = split_backbone(model, start)
        features = parts.features(parts.activations(images), tf.ones(2), training=True).numpy()
        found[stage] = parts.crossing, float(np.abs(features - wanted).max() / np.abs(wanted).max())
    return found


def main() -> None:
    """Prints the deviation at each stage; exits with 1 if one is too large."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--backbones", nargs="*", default=list(BACKBONES))
    failed = False
    for name in parser.parse_args().backbones:
        keras.backend.clear_session()
        for stage, (crossing, deviation) in deviations(BACKBONES[name]).items():
            failed |= not deviation < TOLERANCE
            print(f"{name} {stage}: {deviation:.1e}; {', '.join(crossing)}", flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
