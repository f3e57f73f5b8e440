"""Decides whether to run the frozen layers once for each photo instead of once in every epoch."""

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
    """Epochs of a run that need not run the frozen layers again.

    Attributes:
      given: what they train from instead of photos: `features` or `activations`.
      photos: how many, in how many views.
      epochs: how many they are.
      visits: how often each training photo is looked at in them.
      bytes_a_photo: what is kept of one photo in one view.
      spared_cost: what the frozen layers cost for one photo, in operations.
      other_cost: what the layers that must still run cost, forward only.
      devices: how many share the steps; one of them runs the frozen layers beforehand.
    """

    given: Literal["features", "activations"]
    photos: PhotoCounts
    epochs: int
    visits: float
    bytes_a_photo: int
    spared_cost: float
    other_cost: float
    devices: int = 1

    @property
    def size(self) -> int:
        """Returns the bytes that all is kept in."""
        return self.kept_photos * self.bytes_a_photo

    @property
    def gain(self) -> float:
        """Estimates how many times faster these epochs are, filling the cache included.

        A training step takes the layers that learn forward once, and twice the same backward.
        """
        trained = self.visits * self.photos.train
        validated = self.epochs * self.photos.validation_views * self.photos.validation
        others = (3 * trained + validated) * self.other_cost
        spared = (trained + validated) * self.spared_cost
        filling = self.devices * self.kept_photos * self.spared_cost
        return (spared + others) / max(filling + others, 1.0)

    @property
    def kept_photos(self) -> int:
        """Photos to keep something of, one for each view."""
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
    """Where to keep what the frozen layers make, None for nowhere; and why, in one line."""

    place: Place | None
    reason: str


def decide(setting: str, phase: Phase, room: Room, found: bool = False) -> Decision:
    """Decides whether to cache, and where.

    Args:
      setting: `memory` and `disk` are obeyed, `off` too; `auto` caches where it pays, in memory or
        in a file, in at most half of what is free; `again` wherever it fits, as a resumed run must
        do what it did before.
      phase: what it is for.
      room: what is free.
      found: an earlier run kept on disk what this one would.

    Raises:
      UserError: it is to be cached, and there is no room for it.
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
        return Decision(None, f"off: {phase.given} would make it {phase.gain:.2f} times as fast")
    place: Place | None = "disk" if found else _place(setting, phase.size, room)
    if place is None:
        if setting == "auto":
            return Decision(None, f"off: {amount} of {phase.given} take over half of what is free")
        way_out = {
            "memory": "give --trunk_cache=auto",
            "disk": "give --trunk_cache=auto, or another --cache_dir",
            "again": "the run was started with them: make room, also in the folder TMPDIR",
        }
        raise UserError(
            f"there is no room for a trunk cache: {phase.given} of all photos take {amount}; "
            f"{way_out[setting]}"
        )
    where = {"memory": "in memory", "file": "in a file", "disk": "on disk"}[place]
    views = f", {phase.photos.views} views" if phase.photos.views > 1 else ""
    return Decision(
        place,
        f"{phase.given} {where}{', found there' if found else ''}, {amount}{views}: about "
        f"{phase.gain:.1f} times as fast",
    )


def _place(setting: str, size: int, room: Room) -> Place | None:
    """Returns the first place, in the order of preference, that has room."""
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
