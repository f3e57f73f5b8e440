"""Runs the frozen layers once for each photo and view, and caches their outputs."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow as tf
import tqdm

from research.data.batches import Batch, make_batches
from research.data.cache_store import CacheStore, MakeRows
from research.data.loader import DataLoader
from research.data.photo_cache import cache_folder
from research.data.rows import Rows, rows_in_a_file
from research.data.thread_pool import in_order
from research.loop.plan import Plan
from research.loop.steps import Network
from research.loop.trunk.decision import Decision, FreeSpace, Phase, PhotoCounts, decide
from research.loop.trunk.description import describe_outputs
from research.models.split import SplitBackbone
from research.system import devices
from research.system.errors import UserError
from research.system.machine import free_disk, free_memory
from research.system.progress import photo_bar

# A constant, because the last bits of the outputs depend on the batch size.
BATCH_SIZE = 32


@dataclasses.dataclass(frozen=True, eq=False)
class EpochInput:
    """The network of some epochs, and their photos or cached outputs; hashed by identity."""

    network: Network
    loader: DataLoader


@dataclasses.dataclass(frozen=True)
class RunInputs:
    """The input of each epoch of a run.

    Attributes:
      features_until: number of initial epochs that can be trained from features.
      head: the input of the initial epochs.
      whole: the input of all later epochs.
    """

    features_until: int
    head: EpochInput
    whole: EpochInput

    def for_epoch(self, epoch: int) -> EpochInput:
        """Returns the input of an epoch, counted from 0."""
        return self.head if epoch < self.features_until else self.whole


def bytes_per_photo(parts: SplitBackbone) -> int:
    """Returns the size of the trunk's activations for one photo, in bytes."""
    if parts.trunk is None:
        return 0
    return sum(
        math.prod(tensor.shape[1:]) * tf.as_dtype(tensor.dtype).size
        for tensor in parts.trunk.outputs
    )


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is cached for one phase of a run.

    Attributes:
      phase: the epochs.
      decision: whether and where to cache the outputs of the frozen layers.
      described: the origin of the outputs, by split; None unless they are cached on disk.
    """

    phase: Phase
    decision: Decision
    described: Mapping[str, Mapping[str, Any]] | None


class FrozenLayers:
    """Runs a network's frozen layers over all photos before training, if that is faster.

    Args:
      network: the network of the steps if nothing is cached.
      photos: the loader of the run's photos.
      plan: the run's steps.
      features_until: number of initial epochs that train only the head, on a few views of each
        photo. They need only the features.
      setting: where to cache: `auto`, `memory`, `disk` or `off`.
      folder: the folder of files that stay for later runs; None for the user's cache folder.
      devices: number of devices that train.
    """

    def __init__(
        self,
        network: Network,
        photos: DataLoader,
        plan: Plan,
        features_until: int,
        setting: str = "auto",
        folder: str | None = None,
        devices: int = 1,
    ) -> None:
        self._network = network
        self._setting = setting
        self._photos = photos
        self._plan = plan
        self._features_until = features_until
        self._devices = devices
        self._folder = cache_folder(folder)
        self._store = CacheStore(self._folder)

    def phases(self, step: int) -> list[Phase]:
        """Returns the remaining phases of the run that could be trained from cached outputs.

        Args:
          step: updates made so far.
        """
        parts, plan = self._network.parts, self._plan
        total_cost = parts.trunk_cost + parts.rest_cost

        def phase(
            input_kind: Literal["features", "activations"], epochs: int, size: int, spared: float
        ) -> Phase:
            visits = plan.visits * epochs / plan.epochs
            other = total_cost - spared
            loader = self._loader_of(input_kind)
            photos = PhotoCounts(
                loader.num_train_examples,
                len(loader.examples("validation")),
                loader.augmentation_of("train").views,
                loader.augmentation_of("validation").views or 1,
                loader.augmentation_of("train").endless,
            )
            return Phase(input_kind, photos, epochs, visits, size, spared, other, self._devices)

        phases = []
        if self._features_until < plan.epochs and step < plan.steps:
            # Activations come first, because features can be computed from them.
            epochs, size = plan.epochs - self._features_until, bytes_per_photo(parts)
            phases.append(phase("activations", epochs, size, parts.trunk_cost))
        if step < self._features_until * plan.steps_per_epoch:
            size = 4 * math.prod(self._network.model.feature_shape)
            phases.append(phase("features", self._features_until, size, total_cost))
        return phases

    def choose(self, step: int, cached: Mapping[str, bool] | None) -> list[Choice]:
        """Decides what to cache, and prints it.

        Args:
          step: updates made so far.
          cached: whether the run used a cache before it was resumed, or whether the chief uses
            one, by kind of input. With `auto` this is repeated, so that the weights are the same.

        Raises:
          UserError: there is not enough space for the cache.
        """
        choices = []
        for phase in self.phases(step):
            setting = self._setting
            if cached is not None and setting == "auto":
                setting = "again" if cached.get(phase.input_kind) else "off"
            described = None
            are_known = self._photos.examples("train").weights is None
            if setting == "disk" and not are_known:
                raise UserError(
                    "trunk_cache is 'disk', but photo_cache is 'none', so that the photos are not "
                    "known in advance; give --trunk_cache=auto, or --photo_cache=auto"
                )
            is_asked = setting == "disk" or (
                setting in ("auto", "again") and self._store.has_entries
            )
            if are_known and is_asked:
                loader = self._loader_of(phase.input_kind)
                described = describe_outputs(
                    self._network, loader, phase.input_kind, phase.photos.views_by_split
                )
            if setting == "disk" and described is None:
                raise UserError(
                    "trunk_cache is 'disk', but the backbone has a layer without get_config(), "
                    "which identifies the cached files; give --trunk_cache=memory or off"
                )
            found = described is not None and all(map(self._store.find, described.values()))
            free_space = FreeSpace(
                free_memory(), free_disk(Path(tempfile.gettempdir())), free_disk(self._folder)
            )
            decision = decide(setting, phase, free_space, found)
            print(f"trunk cache  {decision.reason}", flush=True)
            choices.append(Choice(phase, decision, described if decision.place == "disk" else None))
        return choices

    def run(self, choices: Sequence[Choice]) -> RunInputs:
        """Runs the frozen layers and caches their outputs as chosen.

        Raises:
          UserError: their outputs cannot be written.
        """
        whole = EpochInput(self._network, self._photos)
        head = EpochInput(self._network, self._loader_of("features"))
        for choice in choices:
            if choice.decision.place is None:
                continue
            if choice.phase.input_kind == "activations":
                whole = head = self._cache_outputs(whole, choice)
            else:
                head = self._cache_outputs(head, choice)
        return RunInputs(self._features_until, head, whole)

    def _loader_of(self, input_kind: str) -> DataLoader:
        """Returns the loader with the augmentation of the epochs that have this kind of input."""
        if input_kind != "features":
            return self._photos
        return self._photos.with_augmentation(self._photos.augmentation.countable)

    def _cache_outputs(self, epoch_input: EpochInput, choice: Choice) -> EpochInput:
        """Runs frozen layers over all photos and views, and returns their outputs as input."""
        network, loader, phase = epoch_input.network, epoch_input.loader, choice.phase
        # Traced once for full batches and for the shorter last batch of each split.
        signature = view_batches(loader, "train", 0, BATCH_SIZE).element_spec

        @tf.function(input_signature=[signature], autograph=False)
        def run(batch: Batch) -> tuple[tf.Tensor, ...]:
            if phase.input_kind == "features":
                return (network.features(batch, training=False),)
            return network.activations(batch)

        run.get_concrete_function()  # traced in this thread, which has Keras' dtype policy
        cached = {}
        with photo_bar("running the frozen layers", phase.cached_views) as bar:
            for split, views in phase.photos.views_by_split.items():
                fill = functools.partial(_fill, run, loader, split, views, bar)
                if choice.described is not None:
                    is_valid = functools.partial(_first_rows_match, run, loader, split)
                    arrays = self._store.find_or_make(choice.described[split], fill, is_valid)
                else:
                    make_rows = Rows if choice.decision.place == "memory" else rows_in_a_file
                    arrays = tuple(rows.finish() for rows in fill(make_rows))
                examples = loader.examples(split)
                cached[split] = dataclasses.replace(examples, inputs=arrays, views=views)
        return EpochInput(
            dataclasses.replace(network, input_kind=phase.input_kind), loader.with_examples(cached)
        )


def view_batches(loader: DataLoader, split: str, view: int, batch_size: int) -> tf.data.Dataset:
    """Returns all photos of a split once, in stored order, all in the same view."""
    examples, augmentation = loader.examples(split), loader.augmentation_of(split)
    return make_batches(
        examples,
        np.arange(len(examples)),
        batch_size,
        loader.preprocessing,
        augmentation=augmentation,
        numbers=np.tile(augmentation.numbers_of(view), (len(examples), 1)),
    )


def _first_rows_match(
    run: Callable[[Batch], Sequence[tf.Tensor]],
    loader: DataLoader,
    split: str,
    found: Sequence[np.ndarray],
) -> bool:
    """Returns whether the first cached rows match the current outputs of the layers.

    A layer's code may have changed while its configuration did not.
    """
    computed = run(next(iter(view_batches(loader, split, 0, BATCH_SIZE))))
    for tensor, rows in zip(computed, found, strict=True):
        expected = tensor.numpy().astype(np.float32)
        tolerance = 0.02 * float(np.abs(expected).max())
        first = np.asarray(rows[: len(expected)]).astype(np.float32)
        if first.shape != expected.shape or not np.allclose(
            first, expected, rtol=0, atol=tolerance
        ):
            return False
    return True


def _fill(
    run: Callable[[Batch], Sequence[tf.Tensor]],
    loader: DataLoader,
    split: str,
    views: int,
    bar: tqdm.tqdm,
    make_rows: MakeRows,
) -> list[Rows]:
    """Writes the outputs for all views and photos of a split to new rows."""
    rows: list[Rows] = []
    count = views * len(loader.examples(split))
    batches = itertools.chain.from_iterable(
        view_batches(loader, split, view, BATCH_SIZE) for view in range(views)
    )

    def outputs_of(batch: Batch) -> list[np.ndarray]:
        return [tensor.numpy() for tensor in run(batch)]

    with in_order(outputs_of, batches, devices.concurrent_batches()) as computed:
        for _, outputs in computed:
            if not rows:
                rows = [make_rows((count, *values.shape[1:]), values.dtype) for values in outputs]
            for array, values in zip(rows, outputs, strict=True):
                array.append(values)
            bar.update(len(outputs[0]))
    return rows
