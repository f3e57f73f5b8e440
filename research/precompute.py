"""Runs the frozen layers once for each photo and view, and keeps what they make."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow as tf
import tqdm

from research.batches import Batch
from research.cache_store import CacheStore, MakeRows
from research.config import TrainConfig
from research.errors import UserError
from research.loader import DataLoader
from research.machine import free_disk, free_memory
from research.plan import Plan
from research.rows import Rows
from research.split import SplitBackbone
from research.steps import Given, Network
from research.trunk_cache import Decision, Phase, Photos, Room, decide

# Not --batch_size: what is kept must not depend on it, to the last bit.
BATCH_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Feed:
    """What some epochs compute with, and what they take."""

    network: Network
    loader: DataLoader


@dataclasses.dataclass(frozen=True)
class Feeds:
    """What the epochs of a run take.

    Attributes:
      head: of those that train the head alone.
      all: of those that train the unfrozen layers too.
      cached: which of `features` and `activations` are kept, for a resumed run to do the same.
    """

    head: Feed
    all: Feed
    cached: dict[str, bool]


def bytes_a_photo(parts: SplitBackbone) -> int:
    """Returns how much the trunk's activations for one photo take."""
    if parts.trunk is None:
        return 0
    return sum(
        int(np.prod(tensor.shape[1:])) * tf.as_dtype(tensor.dtype).size
        for tensor in parts.trunk.outputs
    )


def phases_of(
    network: Network, photos: DataLoader, plan: Plan, head_epochs: int, step: int
) -> list[Phase]:
    """Returns the phases of a run that could do without frozen layers.

    Args:
      network: what would compute with them.
      photos: the run's photos.
      plan: its steps.
      head_epochs: how many of its epochs train the head alone.
      step: updates made so far: no features are needed when the head is no longer alone.
    """
    parts = network.parts
    kept = Photos(
        photos.num_train_examples,
        len(photos.examples("validation")),
        photos.augmentation.views if photos.augmentation else 1,
    )

    def phase(
        given: Literal["features", "activations"], epochs: int, size: int, spared: float
    ) -> Phase:
        visits = plan.visits * epochs / plan.epochs
        other = parts.trunk_cost + parts.rest_cost - spared
        return Phase(given, kept, epochs, visits, size, spared, other)

    phases = []
    if head_epochs < plan.epochs:
        # First, as features can be made from activations.
        size = bytes_a_photo(parts)
        phases.append(phase("activations", plan.epochs - head_epochs, size, parts.trunk_cost))
    if step < head_epochs * plan.steps_per_epoch:
        size = 4 * network.model.head.kernel.shape[0]
        whole = parts.trunk_cost + parts.rest_cost
        phases.append(phase("features", head_epochs, size, whole))
    return phases


def run_frozen_layers_once(
    config: TrainConfig,
    network: Network,
    photos: DataLoader,
    plan: Plan,
    head_epochs: int,
    step: int,
    cached: Mapping[str, bool] | None,
) -> Feeds:
    """Runs the frozen layers over all photos beforehand where that pays, and says so.

    Args:
      config: of the run.
      network: what the steps would compute with otherwise.
      photos: the run's photos.
      plan: its steps.
      head_epochs: how many of its epochs train the head alone.
      step: updates made so far.
      cached: what a resumed run kept; it goes on alike, to end with the same weights.

    Raises:
      UserError: what is asked for does not fit, or cannot be written.
    """
    folder = Path(config.cache_dir or _default_folder())
    store = CacheStore(folder)
    feed = Feed(network, photos)
    feeds: dict[str, Feed] = {}
    for phase in phases_of(network, photos, plan, head_epochs, step):
        setting = _setting(config.trunk_cache, phase.given, cached)
        described = None
        if setting == "disk" or (setting in ("auto", "again") and store.has_entries):
            described = _describe(network, photos, phase)
        found = described is not None and all(map(store.find, described.values()))
        room = Room(free_memory(), free_disk(folder))
        decision = decide(setting, phase, room, found)
        if decision.place == "disk":
            described = described or _describe(network, photos, phase)
            if described is None:
                decision = _undescribed(setting)
        print(f"trunk cache  {decision.reason}", flush=True)
        if decision.place:
            feed = _keep(feed, phase, store, described if decision.place == "disk" else None)
            feeds[phase.given] = feed
    whole = feeds.get("activations", Feed(network, photos))
    return Feeds(
        head=feeds.get("features", whole),
        all=whole,
        cached={given: given in feeds for given in ("activations", "features")},
    )


def _setting(setting: str, given: Given, cached: Mapping[str, bool] | None) -> str:
    if cached is None or setting != "auto":
        return setting
    return "again" if cached[given] else "off"


def _default_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "finetune-loop"


def _undescribed(setting: str) -> Decision:
    reason = "the backbone has a layer without get_config(), so that files could not be told apart"
    if setting == "auto":
        return Decision(None, f"off: {reason}")
    raise UserError(f"trunk_cache needs files here, but {reason}; give --trunk_cache=memory or off")


def _keep(
    feed: Feed, phase: Phase, store: CacheStore, described: Mapping[str, Mapping[str, Any]] | None
) -> Feed:
    """Runs frozen layers over all photos and views.

    Args:
      feed: what they compute with and take.
      phase: what it is for.
      store: where files are kept.
      described: by split, what is kept there; None to keep it in memory.
    """
    network, loader = feed.network, feed.loader

    # Traced once, for whole batches and for the short last one of each split.
    signature = loader.view_batches("train", 0, BATCH_SIZE).element_spec

    @functools.partial(tf.function, input_signature=[signature])
    def run(batch: Batch) -> tuple[tf.Tensor, ...]:
        if phase.given == "features":
            return (network.features(batch, training=False),)
        return network.activations(batch)

    views = {"train": phase.photos.views or 1, "validation": 1}
    with tqdm.tqdm(
        desc="running the frozen layers",
        total=phase.kept_photos,
        unit=" photos",
        leave=False,
        ncols=79,
        disable=not sys.stderr.isatty(),
    ) as bar:
        kept = {}
        for split, count in views.items():
            examples = loader.examples(split)

            def fill(make_rows: MakeRows, split: str = split, count: int = count) -> list[Rows]:
                return _fill(run, loader, split, count, make_rows, bar)

            if described is None:
                arrays = tuple(rows.finish() for rows in fill(Rows))
            else:
                arrays = store.find_or_make(described[split], fill)
            kept[split] = dataclasses.replace(examples, inputs=arrays, views=count)
    return Feed(dataclasses.replace(network, given=phase.given), loader.with_examples(kept))


def _fill(
    run: Callable[[Batch], Sequence[tf.Tensor]],
    loader: DataLoader,
    split: str,
    views: int,
    make_rows: MakeRows,
    bar: tqdm.tqdm,
) -> list[Rows]:
    rows: list[Rows] = []
    count = views * len(loader.examples(split))
    for view in range(views):
        for batch in loader.view_batches(split, view, BATCH_SIZE):
            made = [tensor.numpy() for tensor in run(batch)]
            if not rows:
                rows = [make_rows((count, *values.shape[1:]), values.dtype) for values in made]
            for one, values in zip(rows, made, strict=True):
                one.append(values)
            bar.update(len(made[0]))
    return rows


def _describe(
    network: Network, photos: DataLoader, phase: Phase
) -> dict[str, dict[str, Any]] | None:
    """Describes, by split, all that what is kept follows from; None where layers cannot be told.

    What photos are turned into before the first layer is described by what becomes of a test
    picture, in each view.
    """
    model, parts = network.model, network.parts
    try:
        layers = json.loads(model.backbone.to_json())
    except (NotImplementedError, TypeError, ValueError):  # a layer that cannot be written down
        return None
    frozen = model.backbone if phase.given == "features" else parts.trunk
    weights = hashlib.sha256()
    for variable in frozen.weights if frozen else ():
        weights.update(f"{variable.shape}".encode())
        weights.update(np.ascontiguousarray(variable.numpy()).data)
    described = {}
    for split, views in (("train", phase.photos.views or 1), ("validation", 1)):
        (pixels,) = photos.examples(split).inputs
        described[split] = {
            "format": 1,
            "kept": phase.given,
            "photos": len(pixels),
            "photos_sha256": hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest(),
            "views": views,
            "prepared_sha256": _prepared(photos, pixels.shape[1], views),
            "layers_sha256": hashlib.sha256(
                json.dumps(_without_trainable(layers), sort_keys=True).encode()
            ).hexdigest(),
            "weights_sha256": weights.hexdigest(),
            "crossing": list(parts.crossing) if phase.given == "activations" else None,
            "tensorflow": importlib.metadata.version("tensorflow"),
            "keras": importlib.metadata.version("keras"),
        }
    return described


def _prepared(photos: DataLoader, size: int, views: int) -> str:
    """Hashes what becomes of a test picture before the first layer, in each view."""
    picture = np.random.default_rng(0).integers(0, 256, (1, size, size, 3)).astype(np.float32)
    digest = hashlib.sha256()
    for view in range(views):
        image: tf.Tensor = tf.constant(picture)
        if photos.augmentation and views > 1:
            image = photos.augmentation.apply(image, photos.augmentation.draws_of(view)[np.newaxis])
        if photos.preprocessing:
            image = photos.preprocessing(image)
        digest.update(image.numpy().data)
    return digest.hexdigest()


def _without_trainable(config: Any) -> Any:
    """Leaves out what --unfreeze_from sets: it does not change what frozen layers make."""
    if isinstance(config, dict):
        return {
            key: _without_trainable(value) for key, value in config.items() if key != "trainable"
        }
    return [_without_trainable(value) for value in config] if isinstance(config, list) else config
