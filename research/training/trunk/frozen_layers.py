"""Runs the frozen layers once for each photo and view, and keeps what they make."""

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

from research.data.batches import Batch
from research.data.loader import DataLoader
from research.data.rows import Rows, rows_in_a_file
from research.models.network import Network
from research.models.split import SplitBackbone
from research.system.errors import UserError
from research.system.machine import free_disk, free_memory
from research.system.progress import photo_bar
from research.training.plan import Plan
from research.training.trunk.decision import Decision, Phase, PhotoCounts, Room, decide
from research.training.trunk.description import describe_kept
from research.training.trunk.store import CacheStore, MakeRows

# Not --batch_size: what is kept must not depend on it, to the last bit.
BATCH_SIZE = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Feed:
    """What some epochs compute with, and the photos that they take; itself a key, by identity."""

    network: Network
    loader: DataLoader


@dataclasses.dataclass(frozen=True)
class Feeds:
    """What the epochs of a run take.

    Attributes:
      features_until: how many epochs at the beginning could be trained from features.
      head: what those take.
      whole: what the epochs after them take.
    """

    features_until: int
    head: Feed
    whole: Feed

    def for_epoch(self, epoch: int) -> Feed:
        """Returns what an epoch takes, counted from 0."""
        return self.head if epoch < self.features_until else self.whole


def bytes_a_photo(parts: SplitBackbone) -> int:
    """Returns how much the trunk's activations for one photo take."""
    if parts.trunk is None:
        return 0
    return sum(
        math.prod(tensor.shape[1:]) * tf.as_dtype(tensor.dtype).size
        for tensor in parts.trunk.outputs
    )


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is done about one phase of a run.

    Attributes:
      phase: the epochs meant.
      decision: whether and where to keep what the frozen layers make for them.
      described: by split, what that follows from; None unless it is kept on disk.
    """

    phase: Phase
    decision: Decision
    described: Mapping[str, Mapping[str, Any]] | None


class FrozenLayers:
    """Runs a network's frozen layers over all photos beforehand, where that pays.

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
        """Returns the phases that are left of the run and could do without frozen layers.

        Args:
          step: updates made so far: no features are needed when the head is no longer alone.
        """
        parts, plan = self._network.parts, self._plan
        whole = parts.trunk_cost + parts.rest_cost

        def phase(
            given: Literal["features", "activations"], epochs: int, size: int, spared: float
        ) -> Phase:
            visits = plan.visits * epochs / plan.epochs
            other = whole - spared
            shown = self._shown(given)
            kept = PhotoCounts(
                shown.num_train_examples,
                len(shown.examples("validation")),
                shown.augmentation_of("train").views,
                shown.augmentation_of("validation").views or 1,
                shown.augmentation_of("train").endless,
            )
            return Phase(given, kept, epochs, visits, size, spared, other, self._devices)

        phases = []
        if self._features_until < plan.epochs and step < plan.steps:
            # First, as features can be made from activations.
            tuned, size = plan.epochs - self._features_until, bytes_a_photo(parts)
            phases.append(phase("activations", tuned, size, parts.trunk_cost))
        if step < self._features_until * plan.steps_per_epoch:
            size = 4 * math.prod(self._network.model.feature_shape)
            phases.append(phase("features", self._features_until, size, whole))
        return phases

    def choose(self, step: int, cached: Mapping[str, bool] | None) -> list[Choice]:
        """Decides what to keep, and says so.

        Args:
          step: updates made so far.
          cached: what a resumed run kept, or the chief does: to the same weights, the same way.

        Raises:
          UserError: what is asked for does not fit.
        """
        choices = []
        for phase in self.phases(step):
            setting = self._setting
            if cached is not None and setting == "auto":
                setting = "again" if cached.get(phase.given) else "off"
            described = None
            if setting == "disk" or (setting in ("auto", "again") and self._store.has_entries):
                shown = self._shown(phase.given)
                described = describe_kept(self._network, shown, phase.given, phase.photos.shown)
            if setting == "disk" and described is None:
                raise UserError(
                    "trunk_cache is 'disk', but the backbone has a layer without get_config(), so "
                    "that files could not be told apart; give --trunk_cache=memory or off"
                )
            found = described is not None and all(map(self._store.find, described.values()))
            room = Room(
                free_memory(), free_disk(Path(tempfile.gettempdir())), free_disk(self._folder)
            )
            decision = decide(setting, phase, room, found)
            print(f"trunk cache  {decision.reason}", flush=True)
            choices.append(Choice(phase, decision, described if decision.place == "disk" else None))
        return choices

    def run(self, choices: Sequence[Choice]) -> Feeds:
        """Runs the frozen layers as was chosen.

        Raises:
          UserError: what they make cannot be written.
        """
        whole = Feed(self._network, self._photos)
        head = Feed(self._network, self._photos.with_few_views())
        for choice in choices:
            if choice.decision.place is None:
                continue
            if choice.phase.given == "activations":
                whole = head = self._keep(whole, choice)
            else:
                head = self._keep(head, choice)
        return Feeds(self._features_until, head, whole)

    def _shown(self, given: str) -> DataLoader:
        """Returns the photos as the epochs that could be given this show them."""
        return self._photos.with_few_views() if given == "features" else self._photos

    def _keep(self, feed: Feed, choice: Choice) -> Feed:
        """Runs frozen layers over all photos and views of a feed."""
        network, loader, phase = feed.network, feed.loader, choice.phase
        # Traced once, for whole batches and for the short last one of each split.
        signature = loader.view_batches("train", 0, BATCH_SIZE).element_spec

        @tf.function(input_signature=[signature], autograph=False)
        def run(batch: Batch) -> tuple[tf.Tensor, ...]:
            if phase.given == "features":
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
        return Feed(dataclasses.replace(network, given=phase.given), loader.with_examples(kept))


def _default_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "finetune-loop"


def _first_rows_are_right(
    run: Callable[[Batch], Sequence[tf.Tensor]],
    loader: DataLoader,
    split: str,
    found: Sequence[np.ndarray],
) -> bool:
    """Compares the first rows of what an earlier run kept with what the layers make now.

    A layer's code may have changed, of which its configuration tells nothing.
    """
    made = run(next(iter(loader.view_batches(split, 0, BATCH_SIZE))))
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
        for batch in loader.view_batches(split, view, BATCH_SIZE):
            made = [tensor.numpy() for tensor in run(batch)]
            if not rows:
                rows = [make_rows((count, *values.shape[1:]), values.dtype) for values in made]
            for one, values in zip(rows, made, strict=True):
                one.append(values)
            bar.update(len(made[0]))
    return rows
