"""Decides whether to cache the outputs of the frozen layers instead of computing them per epoch."""

from __future__ import annotations

import dataclasses
from typing import Literal

from research.system.errors import UserError

Place = Literal["memory", "file", "disk"]

LEAST_GAIN = 1.03


@dataclasses.dataclass(frozen=True)
class PhotoCounts:
    """Numbers of photos to cache.

    Attributes:
      train: training photos.
      validation: validation photos.
      views: views of each training photo; None if they are endless.
      validation_views: views of each validation photo.
      endless: the name of the augmentation with endless views, if there is one.
    """

    train: int
    validation: int
    views: int | None
    validation_views: int = 1
    endless: str | None = None

    @property
    def shown(self) -> dict[str, int]:
        """Views to cache of each photo, by split."""
        return {"train": self.views or 1, "validation": self.validation_views}


@dataclasses.dataclass(frozen=True)
class Phase:
    """Epochs of a run that can be trained from cached outputs of the frozen layers.

    Attributes:
      input_kind: what they are trained from instead of photos: `features` or `activations`.
      photos: the numbers of photos and views.
      epochs: the number of epochs.
      visits: how often each training photo is used in them.
      bytes_per_photo: size of the cached outputs for one view of one photo.
      spared_cost: cost of the frozen layers for one photo, in operations.
      other_cost: cost of the layers that must still run, forward only.
      devices: how many share the steps; only one of them fills the cache.
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
        return self.kept_photos * self.bytes_per_photo

    @property
    def gain(self) -> float:
        """The estimated speed-up of these epochs, including the time to fill the cache.

        The backward pass of the trained layers costs twice their forward pass.
        """
        trained = self.visits * self.photos.train
        validated = self.epochs * self.photos.validation_views * self.photos.validation
        others = (3 * trained + validated) * self.other_cost
        spared = (trained + validated) * self.spared_cost
        filling = self.devices * self.kept_photos * self.spared_cost
        return (spared + others) / max(filling + others, 1.0)

    @property
    def kept_photos(self) -> int:
        """The number of cached views over all photos."""
        photos, shown = self.photos, self.photos.shown
        return shown["train"] * photos.train + shown["validation"] * photos.validation


@dataclasses.dataclass(frozen=True)
class Room:
    """Free bytes.

    Attributes:
      memory: for `memory`.
      temporary: for `file`, a file without a name, which goes with the process.
      cache: for `disk`, the folder whose files stay for later runs.
    """

    memory: int
    temporary: int
    cache: int


@dataclasses.dataclass(frozen=True)
class Decision:
    """Where to cache the outputs, None for no cache; and the reason in one line."""

    place: Place | None
    reason: str


def decide(setting: str, phase: Phase, room: Room, found: bool = False) -> Decision:
    """Decides whether to cache, and where.

    Args:
      setting: `memory`, `disk` and `off` are obeyed. `auto` caches where that is faster, in memory
        or in a file, in at most half of the free space. `again` caches wherever there is room: a
        resumed run must do what it did before.
      phase: the epochs to cache for.
      room: the free space.
      found: an earlier run has cached the same outputs on disk.

    Raises:
      UserError: a cache is asked for, and there is no room for it.
    """
    if setting == "off":
        return Decision(None, "off, as asked")
    if phase.photos.views is None:
        return Decision(None, f"off: {phase.photos.endless} shows photos differently every time")
    if not phase.spared_cost:
        return Decision(None, "off: no layer is frozen")
    found = found and setting != "memory"
    megabytes = phase.size / 1e6
    amount = f"{megabytes:,.{0 if megabytes >= 10 else 1}f} MB"
    if setting == "auto" and phase.gain < LEAST_GAIN and not found:
        return Decision(
            None, f"off: {phase.input_kind} would make it {phase.gain:.2f} times as fast"
        )
    place: Place | None = "disk" if found else _place(setting, phase.size, room)
    if place is None:
        if setting == "auto":
            return Decision(
                None, f"off: {amount} of {phase.input_kind} take over half of the free space"
            )
        way_out = {
            "memory": "give --trunk_cache=auto",
            "disk": "give --trunk_cache=auto, or another --cache_dir",
            "again": "the run was started with them: make room, also in the folder TMPDIR",
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


def _place(setting: str, size: int, room: Room) -> Place | None:
    """Returns the first place with enough room, in the order of preference."""
    places: dict[str, list[tuple[Place, int]]] = {
        "memory": [("memory", room.memory)],
        "disk": [("disk", room.cache)],
        "auto": [("memory", room.memory // 2), ("file", room.temporary // 2)],
        "again": [
            ("memory", room.memory // 2),
            ("file", room.temporary),
            ("memory", room.memory),
        ],
    }
    return next((place for place, free in places[setting] if size <= free), None)
