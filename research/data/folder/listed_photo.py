"""Lists the photos of a folder with their labels, from folders, file names or a label file."""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence
from typing import NamedTuple

from research.data.files import is_hidden
from research.data.folder.folder_layout import FolderLayout, find_layout
from research.data.folder.label_file import FileFinder, LabelRow
from research.data.folder.photo_tree import ListedTree, PhotoTree, joined
from research.system.errors import UserError
from research.system.printable import printable


class ListedPhoto(NamedTuple):
    """A photo before its split is chosen.

    Attributes:
      path: its path in the tree.
      labels: the names of its classes.
      split: its split, if a folder or the label file gives it.
      key: the text whose hash decides the split.
      group: photos of the same group are in the same split; None for no group.
      problem: why the photo cannot be used; None if it can.
    """

    path: str
    labels: tuple[str, ...]
    split: str | None = None
    key: str = ""
    group: str | None = None
    problem: str | None = None


class Listing(NamedTuple):
    """The photos of a folder, how its folders are read, and notes for the user."""

    photos: list[ListedPhoto]
    layout: FolderLayout
    notes: tuple[str, ...] = ()


def list_by_folder(tree: PhotoTree, folder_layout: str) -> Listing:
    """Lists photos whose classes are folders."""
    layout = find_layout(tree, folder_layout)
    photos = []
    for part, split in layout.parts.items():
        for name in tree.children(part)[0]:
            if not is_hidden(name):
                folder = joined(part, name)
                photos += [
                    ListedPhoto(path, (name,), split, path[len(folder) + 1 :])
                    for path in tree.images(folder)
                ]
    return Listing(photos, layout)


def list_by_pattern(tree: PhotoTree, folder_layout: str, pattern: str) -> Listing:
    """Lists photos whose class is the first group of a regular expression in their path.

    The expression is searched in the path below the folder of a split.
    """
    layout = find_layout(tree, folder_layout, has_classes=False)
    photos: list[ListedPhoto] = []
    others: list[str] = []
    unused = []
    for part, split in layout.parts.items():
        before = len(photos)
        for path in tree.images(part):
            key = path[len(part) + 1 :] if part else path
            match = re.search(pattern, key)
            if match and match[1]:
                photos.append(ListedPhoto(path, (match[1],), split, key))
            else:
                others.append(path)
        if len(photos) == before:
            unused.append(part)
    if not photos:
        raise UserError(
            f"label_pattern is {pattern!r}, which is found in none of the {len(others):,} names of "
            f"image_folder {tree.root!r}, such as {others[0] if others else ''!r}; expected a "
            "regular expression whose first group is the class"
        )
    layout = FolderLayout(
        {part: split for part, split in layout.parts.items() if part not in unused},
        (*layout.left_out, *(f"{printable(part)} (no class in the names)" for part in unused)),
    )
    notes = [f"{_counted(others)} without a class in the name"] if others else []
    return Listing(photos, layout, tuple(notes))


def list_by_table(
    tree: PhotoTree, folder_layout: str, rows: Sequence[LabelRow], several_labels: bool
) -> Listing:
    """Lists the photos of a label file.

    Rows that cannot be used become photos with a problem. Several rows for one photo are used if
    they agree, or if photos can have several labels.
    """
    images = tree.images("")
    finder = FileFinder(images)
    by_path: dict[str, list[LabelRow]] = {}
    unusable = []
    for row in rows:
        path, reason = finder.find(row.file)
        problem = row.problem or reason
        if path is None or problem:
            unusable.append(ListedPhoto(path or row.file, (), problem=f"line {row.line} {problem}"))
        else:
            by_path.setdefault(path, []).append(row)
    layout = find_layout(ListedTree(tree, by_path), folder_layout, has_classes=False)
    photos = []
    for path, own in by_path.items():
        part = next(
            (part for part in layout.parts if not part or path.startswith(f"{part}/")), None
        )
        photo = _of_rows(path, own, several_labels)
        if photo.problem is None and part is None:
            photo = photo._replace(problem="is in a folder that is not the folder of a split")
        elif part is not None and photo.split is None:
            photo = photo._replace(split=layout.parts[part])
        photos.append(photo)
    photos = _with_one_split_per_group(photos)
    others = sorted(set(images) - {photo.path for photo in (*photos, *unusable)})
    notes = [f"{_counted(others)} without a row in the label file"] if others else []
    return Listing(photos + unusable, layout, tuple(notes))


def _of_rows(path: str, rows: Sequence[LabelRow], several_labels: bool) -> ListedPhoto:
    """Combines the rows of one photo."""
    labels = tuple(dict.fromkeys(label for row in rows for label in row.labels))
    splits = {row.split for row in rows}
    groups = {row.group for row in rows}
    lines = " and ".join(str(row.line) for row in rows[:3])
    problem = None
    if not several_labels and len({row.labels for row in rows}) > 1:
        problem = f"has different labels in lines {lines}: {', '.join(labels)}"
    elif not several_labels and not labels:
        problem = f"has no label in line {lines}"
    elif len(splits) > 1 or len(groups) > 1:
        problem = f"has different {'splits' if len(splits) > 1 else 'groups'} in lines {lines}"
    return ListedPhoto(path, labels, rows[0].split, path, rows[0].group, problem)


def _with_one_split_per_group(photos: Sequence[ListedPhoto]) -> list[ListedPhoto]:
    """Marks the photos of each group for which several splits are given."""
    splits: dict[str | None, set[str | None]] = collections.defaultdict(set)
    for photo in photos:
        if photo.problem is None:
            splits[photo.group].add(photo.split)
    return [
        photo._replace(problem=f"is in the group {photo.group!r}, which is in several splits")
        if photo.group is not None and len(splits[photo.group] - {None}) > 1
        else photo
        for photo in photos
    ]


def _counted(paths: Sequence[str]) -> str:
    shown = ", ".join(map(printable, paths[:2])) + (", ..." if len(paths) > 2 else "")
    return f"{len(paths):,} {'image' if len(paths) == 1 else 'images'} ({shown})"
