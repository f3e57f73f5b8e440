"""Finds copies of photos and missing classes, and describes them for the user."""

from __future__ import annotations

import collections
import hashlib
import itertools
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence

import numpy as np

from research.data.cache_store import CacheStore, MakeRows
from research.data.digest import digest_of
from research.data.folder.folder_options import Shares
from research.data.folder.label_file import LabelTable
from research.data.folder.listed_photo import ListedPhoto
from research.data.folder.photo_tree import PhotoTree
from research.data.rows import Rows
from research.data.source import SPLITS
from research.system.errors import UserError
from research.system.printable import printable


def find_copies(
    tree: PhotoTree,
    paths: Sequence[str],
    states: Sequence[bytes] = (),
    store: CacheStore | None = None,
) -> list[list[int]]:
    """Returns the indices of files with the same content, as a list for each content.

    Only files of the same size and with the same last bytes are read. In a large folder, nearly
    every file has the size of another.

    Args:
      tree: contains the files.
      paths: of the files.
      states: of each file, by which the store recognises it; see `PhotoTree.state`.
      store: keeps the result, so that the files need not be read again until one is written. None
        keeps nothing. A store that cannot be written is not used.
    """
    if store is None:
        return _compare(tree, paths)

    def compare(make_rows: MakeRows) -> list[Rows]:
        found = _compare(tree, paths)
        pairs = [(group, index) for group, indices in enumerate(found) for index in indices]
        rows = make_rows((len(pairs), 2), np.dtype(np.int64))
        rows.append(np.asarray(pairs, np.int64).reshape(-1, 2))
        return [rows]

    digest = hashlib.sha256()
    for path, state in zip(paths, states, strict=True):
        digest.update(path.encode("utf-8", "surrogateescape") + b"\0" + state)
    described = {"kept": "copies", "photos": len(paths), "files": digest.hexdigest()}
    try:
        (pairs,) = store.find_or_make(described, compare)
    except UserError:
        return _compare(tree, paths)
    copies: dict[int, list[int]] = collections.defaultdict(list)
    for group, index in pairs.tolist():
        copies[group].append(index)
    return list(copies.values())


def _compare(tree: PhotoTree, paths: Sequence[str]) -> list[list[int]]:
    def end_of(index: int) -> int | None:
        end = tree.end(paths[index])
        return None if end is None else hash(end)  # all ends may take gigabytes

    def digest(index: int) -> str | None:
        content = tree.read(paths[index], 0).image
        return None if content is None else digest_of(content)

    found_indices = []
    for indices in _of_one_size(tree, paths):
        places: _Places = collections.defaultdict(list)
        for index in indices:
            places[tree.place(paths[index])].append(index)
        for alike in _divided(places, end_of):
            for same in _divided(alike, digest):
                found_indices.append(sorted(itertools.chain(*same.values())))
    return sorted(indices for indices in found_indices if len(indices) > 1)


def _of_one_size(tree: PhotoTree, paths: Sequence[str]) -> Iterator[list[int]]:
    """Yields the indices of files that have the same size as others, size after size."""
    sizes = np.fromiter((tree.size(path) or 0 for path in paths), np.int64, len(paths))
    order = np.argsort(sizes, kind="stable")
    _, begins, counts = np.unique(sizes[order], return_index=True, return_counts=True)
    for begin, count in zip(begins, counts, strict=True):
        indices = order[begin : begin + count]
        if count > 1 and sizes[indices[0]]:
            yield indices.tolist()


_Places = dict[Hashable, list[int]]  # the indices of the paths of each stored file


def _divided(places: _Places, key: Callable[[int], Hashable | None]) -> list[_Places]:
    """Divides stored files by a key of their first path; a file whose key is None is alone."""
    if len(places) == 1:
        return [places]
    divided: dict[Hashable, _Places] = collections.defaultdict(dict)
    for place, indices in places.items():
        found = key(indices[0])
        divided[(place,) if found is None else found][place] = indices
    return list(divided.values())


def note_copies(
    photos: Sequence[ListedPhoto], splits: Sequence[str], copies: Sequence[Sequence[int]]
) -> list[str]:
    """Returns notes on copies in several splits, and with several labels, each with an example."""
    notes = []
    for where, values in (
        ("in several splits", splits),
        ("with other labels", [photo.labels for photo in photos]),
    ):
        pairs = [
            (found[0], other)
            for found in copies
            if (other := next((one for one in found if values[one] != values[found[0]]), None))
        ]
        if pairs:
            first, second = (printable(photos[index].path) for index in pairs[0])
            has = "photo has" if len(pairs) == 1 else "photos have"
            notes.append(f"{len(pairs):,} {has} copies {where}, such as {first} and {second}")
    return notes


def note_missing_classes(
    photos: Sequence[ListedPhoto], splits: Sequence[str], shares: Shares
) -> list[str]:
    """Returns notes on splits without photos, although they have a share, and without a class."""
    present: dict[str, set[str]] = collections.defaultdict(set)
    numbers: collections.Counter[str] = collections.Counter()
    for photo, split in zip(photos, splits, strict=True):
        for label in photo.labels:
            present[label].add(split)
            numbers[label] += 1
    used = [split for split in SPLITS if split in splits]
    notes = note_empty_splits(used, shares) if "train" in used else []
    missing = sorted(label for label, found in present.items() if len(found) < len(used))
    if missing:
        name, others = missing[0], len(missing) - 1
        absent = " or ".join(split for split in used if split not in present[name])
        more = (
            f", and {others:,} more {'class is' if others == 1 else 'classes are'} missing in a "
            "split"
        )
        notes.append(
            f"the class {printable(name)!r} ({numbers[name]:,} "
            f"{'photo' if numbers[name] == 1 else 'photos'}) has no {absent} photo"
            f"{more if others else ''}"
        )
    return notes


def note_empty_splits(used: Collection[str], shares: Shares) -> list[str]:
    """Returns a note for each split that is not in use, although it has a share."""
    return [
        f"no photo is in the {split} split, although its share is {share} %"
        for split, share in zip(SPLITS, shares, strict=True)
        if share and split not in used
    ]


def note_columns(table: LabelTable, several_labels: bool) -> list[str]:
    """Returns notes on groups, and on labels that are not separated as expected."""
    notes = []
    groups = {row.group for row in table.rows if row.group is not None}
    if groups:
        column = table.columns["group"]
        notes.append(
            f"{len(groups):,} {'group' if len(groups) == 1 else 'groups'} of the column {column!r} "
            f"{'is' if len(groups) == 1 else 'are'} not divided between splits; "
            "--label_columns=group= ignores the column"
        )
    odd = [label for row in table.rows for label in row.labels if "|" in label]
    if several_labels and odd:
        notes.append(f"the label {odd[0]!r} contains '|'; expected ';' between several labels")
    return notes


def note_similar_names(names: Sequence[str]) -> list[str]:
    """Returns a note for the first two names that differ only in case."""
    folded: dict[str, str] = {}
    for name in names:
        other = folded.setdefault(name.casefold(), name)
        if other != name:
            return [f"the classes {other!r} and {name!r} differ only in case"]
    return []
