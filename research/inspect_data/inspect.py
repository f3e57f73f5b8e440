"""Inspects a data set: counts photos and finds damaged files and duplicates."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from research.data.decode import DamagedImageError
from research.data.source import SPLITS, Source, classes_of, counted
from research.data.thread_pool import in_parallel
from research.inspect_data.fingerprints import MAX_PAIRS, Fingerprint, fingerprint, similar_pairs
from research.system.progress import photo_bar

SAME_FILE, SAME_PIXELS, LOOKS_ALIKE = "same file", "same pixels", "looks alike"
KINDS = (SAME_FILE, SAME_PIXELS, LOOKS_ALIKE)
PHOTOS_PER_CHUNK = 8


class Photo(NamedTuple):
    """A stored photo: its split, its index in the split, its name, its labels and its size.

    A damaged photo has a size of 0 x 0 pixels and a reason.
    """

    split: str
    place: int
    name: str
    labels: tuple[int, ...]
    width: int = 0
    height: int = 0
    damage: str | None = None


class Duplicate(NamedTuple):
    """Two or more copies of one photo; `distance` counts the differing bits of their hashes."""

    kind: str
    photos: tuple[Photo, ...]
    distance: int = 0

    @property
    def is_leak(self) -> bool:
        """Whether the copies are in different splits."""
        return len({photo.split for photo in self.photos}) > 1

    @property
    def is_contradiction(self) -> bool:
        """Whether the copies have different labels."""
        return len({photo.labels for photo in self.photos}) > 1


@dataclasses.dataclass(frozen=True)
class Inspection:
    """The results for a data set.

    Attributes:
      class_names: names of the classes, in the order of their labels.
      photos: all stored photos, including damaged ones.
      duplicates: first same files, then same pixels, then similar photos by increasing distance.
      is_cut: whether the limit on similar pairs was reached.
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
        """The photos that cannot be decoded."""
        return [photo for photo in self.photos if photo.damage is not None]


def inspect(source: Source, distance: int) -> Inspection:
    """Decodes each photo of all splits at full size and compares all photos with each other.

    Args:
      source: the photos.
      distance: maximum number of differing bits, of 256, in the perceptual hashes of photos that
        look alike.
    """

    def work(_: int, image: bytes | np.ndarray) -> Fingerprint:
        return fingerprint(image)

    photos: list[Photo] = []
    prints: list[Fingerprint] = []
    with photo_bar("inspecting", sum(source.count(split) for split in SPLITS)) as bar:
        for split in SPLITS:
            examples = counted(source.examples(split), source.count(split))
            with in_parallel(examples, work, PHOTOS_PER_CHUNK) as stored:
                for place, example, found in stored:
                    bar.update()
                    classes = classes_of(example.label, len(source.class_names)) or ()
                    photo = Photo(split, place, example.name, classes)
                    if isinstance(found, DamagedImageError):
                        photos.append(photo._replace(damage=str(found)))
                    else:
                        photos.append(photo._replace(width=found.width, height=found.height))
                        prints.append(found)
    usable = [photo for photo in photos if photo.damage is None]
    duplicates, is_cut = _find_duplicates(usable, prints, distance)
    return Inspection(source.class_names, tuple(photos), tuple(duplicates), is_cut)


def _find_duplicates(
    photos: Sequence[Photo], prints: Sequence[Fingerprint], distance: int
) -> tuple[list[Duplicate], bool]:
    """Returns the duplicates, and whether the limit on similar pairs was reached.

    Photos with the same pixels are compared with the others only once.
    """
    if not prints:
        return [], False
    by_pixels: dict[str, list[int]] = collections.defaultdict(list)
    for index, one in enumerate(prints):
        by_pixels[one.pixel_digest].append(index)
    groups = list(by_pixels.values())
    duplicates = []
    for group in (group for group in groups if len(group) > 1):
        files = {prints[index].file_digest for index in group}
        kind = SAME_FILE if len(files) == 1 else SAME_PIXELS
        duplicates.append(Duplicate(kind, tuple(photos[index] for index in group)))
    hashes = np.stack([prints[group[0]].perceptual_hash for group in groups])
    thumbnails = np.stack([prints[group[0]].thumbnail for group in groups])
    pairs = similar_pairs(hashes, thumbnails, distance)
    for first, second, bits in pairs:
        sides = ([photos[index] for index in groups[side]] for side in (first, second))
        # Of copies with the same pixels, show a leak or a contradiction if there is one.
        shown = max(
            itertools.product(*sides),
            key=lambda pair: (pair[0].split != pair[1].split, pair[0].labels != pair[1].labels),
        )
        duplicates.append(Duplicate(LOOKS_ALIKE, shown, bits))
    duplicates.sort(key=lambda duplicate: (KINDS.index(duplicate.kind), duplicate.distance))
    return duplicates, len(pairs) == MAX_PAIRS
