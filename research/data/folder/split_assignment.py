"""Assigns photos to splits by a hash of their names, with the same shares in each class."""

from __future__ import annotations

import collections
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from research.data.folder.folder_options import Shares
from research.data.folder.listed_photo import ListedPhoto
from research.data.source import SPLITS


def split_fraction(name: str) -> float:
    """Returns a hash of the name in [0, 1)."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def assign_splits(
    photos: Sequence[ListedPhoto], shares: Shares, copies: Sequence[Sequence[int]] = ()
) -> list[str]:
    """Returns the split of each photo.

    A given split is kept. Photos without a split are divided among train and the splits for which
    no photos are given, and if there are none, so are those of train. In each class, photos are
    ordered by their hash, and the order is cut at the shares. So photos that are added to a class
    move only photos near the cuts, and photos of other classes move none. Photos of a group, and
    copies of a photo, are in the same split.

    Args:
      photos: the photos.
      shares: percentages of train, validation and test.
      copies: indices of photos with the same content.
    """
    given = [photo.split for photo in photos]
    of_group = {photo.group: photo.split for photo in photos if photo.group and photo.split}
    free = {
        split: share
        for split, share in zip(SPLITS[1:], shares[1:], strict=True)
        if share and split not in given
    }
    splits = [split or "train" for split in given]
    if not free and None not in given:
        return splits
    percent = {"train": 100 - sum(free.values()), **free}
    # If there are photos without a split, those of train stay there.
    free_split = None if None in given else "train"
    by_class: dict[str, list[_Unit]] = collections.defaultdict(list)
    for unit in _units(photos, copies):
        fixed = [splits[index] for index in unit.photos if given[index] != free_split]
        free_photos = tuple(index for index in unit.photos if given[index] == free_split)
        if fixed and free_split is None:  # they are where their group is, or else their copies
            for index in free_photos:
                splits[index] = of_group.get(photos[index].group or "", fixed[0])
        elif free_photos:
            by_class[unit.label].append(unit._replace(photos=free_photos))
    for members in by_class.values():
        members.sort(key=lambda unit: (unit.fraction, unit.photos))
        parts = cut([len(unit.photos) for unit in members], percent)
        for unit, split in zip(members, parts, strict=True):
            for index in unit.photos:
                splits[index] = split
    return splits


def cut(sizes: Sequence[int], percent: Mapping[str, int]) -> list[str]:
    """Divides a sequence of units into consecutive parts, one for each split.

    Each part ends between the two units where its size is closest to its share. Each split has at
    least one unit if there are enough units, so with few units a part can be larger than its share.

    Args:
      sizes: the number of photos of each unit.
      percent: the shares of the splits, which sum to 100.
    """
    ends = list(itertools.accumulate(sizes, initial=0))
    wanted = list(itertools.accumulate(percent.values()))
    parts: list[str] = []
    for position, split in enumerate(percent):
        later = len(percent) - position - 1
        end = len(sizes)
        if later:
            target = ends[-1] * wanted[position] / 100
            end = min(range(len(ends)), key=lambda index: abs(ends[index] - target))
            if len(sizes) >= len(percent):
                end = min(max(end, len(parts) + 1), len(sizes) - later)
        parts += [split] * (end - len(parts))
    return parts


class _Unit(NamedTuple):
    """Photos that share a split, by index; their hash, and the class that they count for."""

    photos: tuple[int, ...]
    fraction: float
    label: str


def _units(photos: Sequence[ListedPhoto], copies: Sequence[Sequence[int]]) -> Iterator[_Unit]:
    """Joins photos that are in the same group or have the same content."""
    by_group: dict[str, list[int]] = collections.defaultdict(list)
    for index, photo in enumerate(photos):
        if photo.group is not None:
            by_group[photo.group].append(index)
    first = list(range(len(photos)))  # an index of the same unit, at most the own index

    def root(index: int) -> int:
        while first[index] != index:
            first[index] = index = first[first[index]]
        return index

    for joined in (*by_group.values(), *copies):
        for index in joined[1:]:
            low, high = sorted((root(joined[0]), root(index)))
            first[high] = low
    members: dict[int, list[int]] = collections.defaultdict(list)
    for index in range(len(photos)):
        if first[index] != index:
            members[root(index)].append(index)
    frequency = collections.Counter(label for photo in photos for label in photo.labels)
    for index in range(len(photos)):
        if first[index] == index:
            yield _unit(photos, [index, *members.get(index, ())], frequency)


def _unit(photos: Sequence[ListedPhoto], own: list[int], frequency: Mapping[str, int]) -> _Unit:
    names = [photos[index].group or photos[index].key for index in own]
    # A photo of several classes counts for the rarest of them.
    labels = [
        found[0]
        if len(found := photos[index].labels) == 1
        else min(found, key=lambda one: (frequency[one], one), default="")
        for index in own
    ]
    if len(own) == 1:  # nearly always, and much faster
        return _Unit((own[0],), split_fraction(names[0]), labels[0])
    label = min(collections.Counter(labels).items(), key=lambda pair: (-pair[1], pair[0]))[0]
    return _Unit(tuple(own), min(map(split_fraction, names)), label)
