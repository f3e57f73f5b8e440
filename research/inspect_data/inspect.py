"""Looks through a data set before training: what is in it, what is damaged, what is there twice."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Generator, Sequence
from typing import NamedTuple

import numpy as np

from research.data.decode import DamagedImageError, oddities_ignored
from research.data.parallel import in_parallel
from research.data.source import SPLITS, Example, Source
from research.inspect_data.duplicates import PAIRS_AT_MOST, equal_groups, similar_pairs
from research.inspect_data.fingerprints import Fingerprint, fingerprint
from research.system.progress import photo_bar

SAME_FILE, SAME_PIXELS, LOOKS_ALIKE = "same file", "same pixels", "looks alike"
KINDS = (SAME_FILE, SAME_PIXELS, LOOKS_ALIKE)
PHOTOS_A_CHUNK = 8


class Photo(NamedTuple):
    """A stored photo: its split and place there, its name, its class, and its size in pixels.

    A damaged one has the size 0 x 0 and a reason.
    """

    split: str
    place: int
    name: str
    label: int
    width: int = 0
    height: int = 0
    damage: str | None = None


class Duplicate(NamedTuple):
    """Photos that are one photo: of `KINDS`, two or more, and the distance of their hashes."""

    kind: str
    photos: tuple[Photo, ...]
    distance: int = 0

    @property
    def is_leak(self) -> bool:
        """Whether they lie in several splits."""
        return len({photo.split for photo in self.photos}) > 1

    @property
    def is_contradiction(self) -> bool:
        """Whether they have different labels."""
        return len({photo.label for photo in self.photos}) > 1


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What was found in a data set.

    Attributes:
      class_names: by label.
      photos: all that are stored, damaged ones included.
      duplicates: those of one file first, then of equal pixels, then alike ones from the nearest.
      is_cut: there are more alike ones than are kept.
    """

    class_names: tuple[str, ...]
    photos: tuple[Photo, ...]
    duplicates: tuple[Duplicate, ...]
    is_cut: bool = False

    @property
    def usable(self) -> list[Photo]:
        """The photos that can be decoded."""
        return [photo for photo in self.photos if photo.damage is None]

    @property
    def damaged(self) -> list[Photo]:
        """The photos that cannot."""
        return [photo for photo in self.photos if photo.damage is not None]

    @property
    def leaks(self) -> list[Duplicate]:
        """Photos that lie in several splits."""
        return [duplicate for duplicate in self.duplicates if duplicate.is_leak]

    @property
    def contradictions(self) -> list[Duplicate]:
        """Photos with different labels for what is one photo."""
        return [duplicate for duplicate in self.duplicates if duplicate.is_contradiction]


def inspect(source: Source, distance: int) -> Inspection:
    """Decodes each photo of all splits once, in full, and compares all with each other.

    Args:
      source: where they come from.
      distance: how many of 256 bits the perceptual hashes of photos that look alike may differ in.
    """
    photos: list[Photo] = []
    usable: list[Photo] = []
    prints: list[Fingerprint] = []
    with oddities_ignored(), contextlib.closing(_fingerprints(source)) as fingerprints:
        for photo, found in fingerprints:
            if isinstance(found, DamagedImageError):
                photos.append(photo._replace(damage=str(found)))
            else:
                usable.append(photo._replace(width=found.width, height=found.height))
                photos.append(usable[-1])
                prints.append(found)
    duplicates, is_cut = find_duplicates(usable, prints, distance)
    return Inspection(source.class_names, tuple(photos), tuple(duplicates), is_cut)


def _fingerprints(
    source: Source,
) -> Generator[tuple[Photo, Fingerprint | DamagedImageError], None, None]:
    def work(example: Example) -> Fingerprint | DamagedImageError:
        if example.image is None:
            return DamagedImageError(example.problem)
        try:
            return fingerprint(example.image)
        except DamagedImageError as damage:
            return damage

    with photo_bar("inspecting", sum(source.count(split) for split in SPLITS)) as bar:
        for split in SPLITS:
            with in_parallel(source.examples(split), work, PHOTOS_A_CHUNK) as stored:
                for place, (example, found) in enumerate(stored):
                    bar.update()
                    yield Photo(split, place, example.name, example.label), found


def find_duplicates(
    photos: Sequence[Photo], prints: Sequence[Fingerprint], distance: int
) -> tuple[list[Duplicate], bool]:
    """Returns the photos that are there more than once, and whether there are more of them.

    Photos of equal pixels are compared with others as one.
    """
    groups = equal_groups([one.pixel_digest for one in prints])
    equal = []
    for group in (group for group in groups if len(group) > 1):
        files = {prints[index].file_digest for index in group}
        kind = SAME_FILE if len(files) == 1 else SAME_PIXELS
        equal.append(Duplicate(kind, tuple(photos[index] for index in group)))
    alike: list[Duplicate] = []
    pairs = []
    if prints:
        firsts = [prints[group[0]] for group in groups]
        looks = np.stack([one.look for one in firsts])
        thumbnails = np.stack([one.thumbnail for one in firsts])
        pairs = similar_pairs(looks, thumbnails, distance)
    for pair in pairs:
        sides = ([photos[index] for index in groups[side]] for side in (pair.first, pair.second))
        alike.append(Duplicate(LOOKS_ALIKE, _most_telling(*sides), pair.distance))
    equal.sort(key=lambda duplicate: KINDS.index(duplicate.kind))
    alike.sort(key=lambda duplicate: duplicate.distance)
    return equal + alike, len(pairs) == PAIRS_AT_MOST


def _most_telling(some: Sequence[Photo], others: Sequence[Photo]) -> tuple[Photo, Photo]:
    """Returns one of each: of different splits where there are, else of different labels."""
    return max(
        itertools.product(some, others),
        key=lambda pair: (pair[0].split != pair[1].split, pair[0].label != pair[1].label),
    )
