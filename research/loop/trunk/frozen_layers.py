"""Runs the frozen layers once for each photo and view, and caches their outputs."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow as tf
import tqdm

from research.data.batches import Batch, make_batches
from research.data.loader import DataLoader
from research.data.rows import Rows, rows_in_a_file
from research.loop.plan import Plan
from research.loop.steps import Network
from research.loop.trunk.decision import Decision, Phase, PhotoCounts, Room, decide
from research.loop.trunk.description import describe_kept
from research.loop.trunk.store import CacheStore, MakeRows
from research.models.split import SplitBackbone
from research.system.errors import UserError
from research.system.machine import free_disk, free_memory
from research.system.progress import photo_bar

# Not --batch_size: the cached outputs must not depend on it, to the last bit.
BATCH_SIZE = 32


@dataclasses.dataclass(frozen=True, eq=False)
class EpochInput:
    """The network and the photos, or cached outputs, of some epochs; hashed by identity."""

    network: Network
    loader: DataLoader


@dataclasses.dataclass(frozen=True)
class RunInputs:
    """The input of each epoch of a run.

    Attributes:
      features_until: the number of epochs at the beginning that can be trained from features.
      head: the input of these epochs.
      whole: the input of the epochs after them.
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
      described: by split, what the outputs follow from; None unless they are cached on disk.
    """

    phase: Phase
    decision: Decision
    described: Mapping[str, Mapping[str, Any]] | None


class FrozenLayers:
    """Runs a network's frozen layers over all photos before training, where that is faster.

    Args:
      network: what the steps compute with, unless something is cached.
      photos: the run's photos.
      plan: its steps.
      features_until: the number of epochs at the beginning that train the head alone, on a few
        views of each photo. They need only what goes into the head.
      setting: where to cache: `auto`, `memory`, `disk` or `off`.
      folder: of files that stay for later runs; None for the user's cache folder.
      devices: how many share a step.
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
        self._folder = Path(folder or _default_folder())
        self._store = CacheStore(self._folder)

    def phases(self, step: int) -> list[Phase]:
        """Returns the remaining phases of the run that could be trained from cached outputs.

        Args:
          step: updates made so far.
        """
        parts, plan = self._network.parts, self._plan
        whole = parts.trunk_cost + parts.rest_cost

        def phase(
            input_kind: Literal["features", "activations"], epochs: int, size: int, spared: float
        ) -> Phase:
            visits = plan.visits * epochs / plan.epochs
            other = whole - spared
            shown = self._shown(input_kind)
            kept = PhotoCounts(
                shown.num_train_examples,
                len(shown.examples("validation")),
                shown.augmentation_of("train").views,
                shown.augmentation_of("validation").views or 1,
                shown.augmentation_of("train").endless,
            )
            return Phase(input_kind, kept, epochs, visits, size, spared, other, self._devices)

        phases = []
        if self._features_until < plan.epochs and step < plan.steps:
            # First: features can be computed from activations.
            tuned, size = plan.epochs - self._features_until, bytes_per_photo(parts)
            phases.append(phase("activations", tuned, size, parts.trunk_cost))
        if step < self._features_until * plan.steps_per_epoch:
            size = 4 * math.prod(self._network.model.feature_shape)
            phases.append(phase("features", self._features_until, size, whole))
        return phases

    def choose(self, step: int, cached: Mapping[str, bool] | None) -> list[Choice]:
        """Decides what to cache, and prints it.

        Args:
          step: updates made so far.
          cached: the decisions of the run before it was resumed, or of the chief, by kind of
            input. They are repeated, so that the weights stay the same.

        Raises:
          UserError: there is no room for the cache.
        """
        choices = []
        for phase in self.phases(step):
            setting = self._setting
            if cached is not None and setting == "auto":
                setting = "again" if cached.get(phase.input_kind) else "off"
            described = None
            if setting == "disk" or (setting in ("auto", "again") and self._store.has_entries):
                shown = self._shown(phase.input_kind)
                described = describe_kept(
                    self._network, shown, phase.input_kind, phase.photos.shown
                )
            if setting == "disk" and described is None:
                raise UserError(
                    "trunk_cache is 'disk', but the backbone has a layer without get_config(), by "
                    "which files are identified; give --trunk_cache=memory or off"
                )
            found = described is not None and all(map(self._store.find, described.values()))
            room = Room(
                free_memory(), free_disk(Path(tempfile.gettempdir())), free_disk(self._folder)
            )
            decision = decide(setting, phase, room, found)
            print(f"trunk cache  {decision.reason}", flush=True)
            choices.append(Choice(phase, decision, described if decision.place == "disk" else None))
        return choices

    def run(self, choices: Sequence[Choice]) -> RunInputs:
        """Runs the frozen layers.

        Raises:
          UserError: their outputs cannot be written.
        """
        whole = EpochInput(self._network, self._photos)
        head = EpochInput(self._network, self._photos.with_few_views())
        for choice in choices:
            if choice.decision.place is None:
                continue
            if choice.phase.input_kind == "activations":
                whole = head = self._keep(whole, choice)
            else:
                head = self._keep(head, choice)
        return RunInputs(self._features_until, head, whole)

    def _shown(self, input_kind: str) -> DataLoader:
        """Returns the photos with the views of the epochs that have this kind of input."""
        return self._photos.with_few_views() if input_kind == "features" else self._photos

    def _keep(self, epoch_input: EpochInput, choice: Choice) -> EpochInput:
        """Runs frozen layers over all photos and views of an input."""
        network, loader, phase = epoch_input.network, epoch_input.loader, choice.phase
        # Traced once, for full batches and for the short last batch of each split.
        signature = view_batches(loader, "train", 0, BATCH_SIZE).element_spec

        @tf.function(input_signature=[signature], autograph=False)
        def run(batch: Batch) -> tuple[tf.Tensor, ...]:
            if phase.input_kind == "features":
                return (network.features(batch, training=False),)
            return network.activations(batch)

        kept = {}
        with photo_bar("running the frozen layers", phase.kept_photos) as bar:
            for split, views in phase.photos.shown.items():
                fill = functools.partial(_fill, run, loader, split, views, bar)
                if choice.described is not None:
                    is_right = functools.partial(_first_rows_are_right, run, loader, split)
                    arrays = self._store.find_or_make(choice.described[split], fill, is_right)
                else:
                    make_rows = Rows if choice.decision.place == "memory" else rows_in_a_file
                    arrays = tuple(rows.finish() for rows in fill(make_rows))
                examples = loader.examples(split)
                kept[split] = dataclasses.replace(examples, inputs=arrays, views=views)
        return EpochInput(
            dataclasses.replace(network, input_kind=phase.input_kind), loader.with_examples(kept)
        )


def _default_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "finetune-loop"


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


def _first_rows_are_right(
    run: Callable[[Batch], Sequence[tf.Tensor]],
    loader: DataLoader,
    split: str,
    found: Sequence[np.ndarray],
) -> bool:
    """Compares the first cached rows with the outputs that the layers compute now.

    A layer's code may have changed while its configuration did not.
    """
    made = run(next(iter(view_batches(loader, split, 0, BATCH_SIZE))))
    for tensor, rows in zip(made, found, strict=True):
        expected = tensor.numpy().astype(np.float32)
        tolerance = 0.02 * float(np.abs(expected).max())
        first = np.asarray(rows[: len(expected)]).astype(np.float32)
        if not np.allclose(first, expected, rtol=0, atol=tolerance):
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
    rows: list[Rows] = []
    count = views * len(loader.examples(split))
    for view in range(views):
        for batch in view_batches(loader, split, view, BATCH_SIZE):
            made = [tensor.numpy() for tensor in run(batch)]
            if not rows:
                rows = [make_rows((count, *values.shape[1:]), values.dtype) for values in made]
            for one, values in zip(rows, made, strict=True):
                one.append(values)
            bar.update(len(made[0]))
    return rows
