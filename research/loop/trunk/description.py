"""Describes the origin of cached features and activations, to identify files on disk."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from research.data.loader import DataLoader
from research.data.photo_cache import decoder_versions
from research.loop.steps import Network
from research.system import devices


def describe_outputs(
    network: Network, loader: DataLoader, input_kind: str, views: Mapping[str, int]
) -> dict[str, dict[str, Any]] | None:
    """Describes, by split, everything that the cached outputs depend on.

    Augmentation and preprocessing are described by their results for a test image.

    Args:
      network: the network with the frozen layers.
      loader: the photos, with the views to cache.
      input_kind: the cached outputs, `features` or `activations`.
      views: the number of views of each photo, by split.

    Returns:
      None if a layer has no `get_config()`.
    """
    model, parts = network.model, network.parts
    try:
        layers = _without(json.loads(model.backbone.to_json()), ("trainable", "synchronized"))
    except (NotImplementedError, TypeError, ValueError):  # a layer without get_config()
        return None
    frozen, of_features = parts.trunk, None
    if input_kind == "features":
        # Only frozen BatchNorm layers are folded, and folding changes the last bits of the outputs.
        frozen = model.backbone
        of_features = [
            *(layer.trainable for layer in model.backbone._flatten_layers()),
            *(type(model.pooling).__name__, list(model.feature_shape)),
        ]
    weights = hashlib.sha256()
    for variable in frozen.weights if frozen else ():
        weights.update(f"{variable.shape}".encode())
        weights.update(np.ascontiguousarray(variable.numpy()).data)
    common = {
        "format": 3,
        "kept": input_kind,
        "layers_sha256": _hash_of_json([layers, of_features]),
        "weights_sha256": weights.hexdigest(),
        "crossing": list(parts.crossing),
        "device": "GPU" if devices.has_gpu() else "CPU",
        "tensorflow": importlib.metadata.version("tensorflow"),
        "keras": importlib.metadata.version("keras"),
    }
    described = {}
    for split, count in views.items():
        examples = loader.examples(split)
        described[split] = {
            **common,
            "photos": len(examples),
            "photos_sha256": hashlib.sha256("".join(examples.digests).encode()).hexdigest(),
            "size": loader.image_size,
            "resize": loader.resize,
            "decoders": decoder_versions(),
            "views": count,
            "prepared_sha256": _hash_of_preprocessing(loader, split, loader.image_size, count),
        }
    return described


def _hash_of_preprocessing(loader: DataLoader, split: str, size: int, views: int) -> str:
    """Hashes the input of the first layer for a test image, in each view."""
    picture = np.random.default_rng(0).integers(0, 256, (1, size, size, 3)).astype(np.uint8)
    digest = hashlib.sha256()
    for view in range(views):
        augmentation = loader.augmentation_of(split)
        numbers = augmentation.numbers_of(view)[np.newaxis]
        changed = augmentation.change_pixels(picture, numbers).astype(np.float32)
        image = augmentation.apply(tf.constant(changed), tf.constant(numbers))
        if loader.preprocessing:
            image = loader.preprocessing(image)
        digest.update(image.numpy().data)
    return digest.hexdigest()


def _hash_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _without(config: Any, left_out: tuple[str, ...]) -> Any:
    """Removes settings that do not change the outputs of frozen layers, at every depth."""
    if isinstance(config, dict):
        return {
            key: _without(value, left_out) for key, value in config.items() if key not in left_out
        }
    return [_without(value, left_out) for value in config] if isinstance(config, list) else config
