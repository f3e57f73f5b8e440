"""Decides whether to cache the outputs of the frozen layers, and where."""

from __future__ import annotations

import dataclasses
from typing import Literal

from research.system.errors import UserError

Place = Literal["memory", "file", "disk"]

MIN_SPEED_UP = 1.03


@dataclasses.dataclass(frozen=True)
class PhotoCounts:
    """Numbers of photos to cache.

    Attributes:
      train: training photos.
      validation: validation photos.
      views: views of each training photo; None if they cannot be counted.
      validation_views: views of each validation photo.
      endless: the name of the augmentation whose views cannot be counted, or None.
    """

    train: int
    validation: int
    views: int | None
    validation_views: int = 1
    endless: str | None = None

    @property
    def views_by_split(self) -> dict[str, int]:
        """The number of views to cache per photo, by split; without validation if it is empty."""
        views = {"train": self.views or 1, "validation": self.validation_views}
        return views if self.validation else {"train": views["train"]}


@dataclasses.dataclass(frozen=True)
class Phase:
    """Epochs of a run that can be trained from cached outputs of the frozen layers.

    Attributes:
      input_kind: the cached outputs: `features` or `activations`.
      photos: the numbers of photos and views.
      epochs: the number of epochs.
      visits: the average number of times that a training photo is used in these epochs.
      bytes_per_photo: size of the cached outputs for one view of one photo.
      spared_cost: cost of the cached layers for one photo, in operations.
      other_cost: cost of the forward pass of the other layers, which run in each step.
      devices: number of devices that train; only one of them fills the cache.
    """

    input_kind: Literal["features", "activations"]
    photos: PhotoCounts
    epochs: int
    visits: float
    bytes_per_photo: int
    spared_cost: float
    other_cost: float
    devices: int = 1

    @property
    def size(self) -> int:
        """The size of the whole cache in bytes."""
        return self.cached_views * self.bytes_per_photo

    @property
    def gain(self) -> float:
        """The estimated speed-up of these epochs, including the time to fill the cache.

        The backward pass of the trained layers costs twice their forward pass.
        """
        trained = self.visits * self.photos.train
        validated = self.epochs * self.photos.validation_views * self.photos.validation
        others = (3 * trained + validated) * self.other_cost
        spared = (trained + validated) * self.spared_cost
        filling = self.devices * self.cached_views * self.spared_cost
        return (spared + others) / max(filling + others, 1.0)

    @property
    def cached_views(self) -> int:
        """The number of cached views over all photos."""
        counts = {"train": self.photos.train, "validation": self.photos.validation}
        return sum(views * counts[split] for split, views in self.photos.views_by_split.items())


@dataclasses.dataclass(frozen=True)
class FreeSpace:
    """Free space, in bytes.

    Attributes:
      memory: free main memory, for `memory`.
      temporary: free space for temporary files, for `file`: an unnamed file that is removed when
        the process ends.
      cache: free space in the cache folder, for `disk`; its files stay for later runs.
    """

    memory: int
    temporary: int
    cache: int


@dataclasses.dataclass(frozen=True)
class Decision:
    """Where to cache the outputs (None for no cache), and the reason in one line."""

    place: Place | None
    reason: str


def decide(setting: str, phase: Phase, free_space: FreeSpace, found: bool = False) -> Decision:
    """Decides whether to cache, and where.

    Args:
      setting: `memory`, `disk` and `off` are always applied. `auto` caches if that is faster, in
        memory or in a file, in at most half of the free space. `again` caches in any place with
        enough space, because a resumed run must use a cache if it used one before.
      phase: the epochs to cache for.
      free_space: the free space in each place.
      found: whether an earlier run has cached the same outputs on disk.

    Raises:
      UserError: a cache is requested, but there is not enough space.
    """
    if setting == "off":
        return Decision(None, "off, as requested")
    if phase.photos.views is None:
        return Decision(None, f"off: {phase.photos.endless} shows photos differently every time")
    if not phase.spared_cost:
        return Decision(None, "off: no layer is frozen")
    found = found and setting != "memory"
    megabytes = phase.size / 1e6
    amount = f"{megabytes:,.{0 if megabytes >= 10 else 1}f} MB"
    if setting == "auto" and phase.gain < MIN_SPEED_UP and not found:
        return Decision(
            None, f"off: {phase.input_kind} would make training {phase.gain:.2f} times as fast"
        )
    place: Place | None = "disk" if found else _place(setting, phase.size, free_space)
    if place is None:
        if setting == "auto":
            return Decision(
                None, f"off: {amount} of {phase.input_kind} need over half of the free space"
            )
        way_out = {
            "memory": "give --trunk_cache=auto",
            "disk": "give --trunk_cache=auto, or another --cache_dir",
            "again": "the run was started with this cache; free memory, or space in TMPDIR",
        }
        raise UserError(
            f"there is no room for a trunk cache: {phase.input_kind} of all photos take {amount}; "
            f"{way_out[setting]}"
        )
    where = {"memory": "in memory", "file": "in a file", "disk": "on disk"}[place]
    views = f", {phase.photos.views} views" if phase.photos.views > 1 else ""
    return Decision(
        place,
        f"{phase.input_kind} {where}{', found there' if found else ''}, {amount}{views}: about "
        f"{phase.gain:.1f} times as fast",
    )


def _place(setting: str, size: int, free_space: FreeSpace) -> Place | None:
    """Returns the first place with enough room, in the order of preference."""
    places: dict[str, list[tuple[Place, int]]] = {
        "memory": [("memory", free_space.memory)],
        "disk": [("disk", free_space.cache)],
        "auto": [("memory", free_space.memory // 2), ("file", free_space.temporary // 2)],
        "again": [
            ("memory", free_space.memory // 2),
            ("file", free_space.temporary),
            ("memory", free_space.memory),
        ],
    }
    return next((place for place, free in places[setting] if size <= free), None)
