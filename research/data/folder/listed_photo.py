"""Lists the photos of a folder with their labels, from folders, file names or a label file."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from research.data.files import is_hidden
from research.data.folder.folder_layout import FolderLayout
from research.data.folder.label_file import LabelRow
from research.data.folder.photo_tree import PhotoTree, joined
from research.system.errors import UserError
from research.system.printable import printable

NO_LABEL = "without a label, which have none of the classes"


class ListedPhoto(NamedTuple):
    """A photo before its split is chosen.

    Attributes:
      path: its path in the tree.
      labels: the names of its classes.
      split: its split, if a folder or the label file gives it.
      key: the text whose hash decides the split.
      group: photos of the same group are in the same split; None for no group.
      problem: why the photo cannot be used; None if it can.
      name: by which a person finds it. It is the name in the label file, so that it does not change
        when photos of other folders are added.
    """

    path: str
    labels: tuple[str, ...]
    split: str | None = None
    key: str = ""
    group: str | None = None
    problem: str | None = None
    name: str = ""


class Listing(NamedTuple):
    """The photos of a folder, the origin of their splits, and notes for the user."""

    photos: list[ListedPhoto]
    origin: str
    notes: tuple[str, ...] = ()


def list_by_folder(tree: PhotoTree, layout: FolderLayout) -> Listing:
    """Lists photos whose classes are folders."""
    photos = []
    for part, split in layout.parts.items():
        for name in tree.folders(part):
            if not is_hidden(name):
                folder, labels = joined(part, name), (name,)
                photos += [
                    ListedPhoto(path, labels, split, path[len(folder) + 1 :], name=path)
                    for path in tree.images(folder)
                ]
    return Listing(photos, str(layout))


def list_by_pattern(tree: PhotoTree, layout: FolderLayout, pattern: str) -> Listing:
    """Lists photos whose class is the first group of a regular expression in their path.

    The expression is searched in the path below the folder of a split.
    """
    photos: list[ListedPhoto] = []
    others: list[str] = []
    unused = []
    for part, split in layout.parts.items():
        before = len(photos)
        for path in all_images(tree, part):
            key = path[len(part) + 1 :] if part else path
            match = re.search(pattern, key)
            if match and match[1]:
                photos.append(ListedPhoto(path, (match[1],), split, key, name=path))
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
    return Listing(photos, str(layout), tuple(notes))


def list_by_table(
    rows: Sequence[LabelRow],
    find: Callable[[str], tuple[str | None, str]],
    images: Iterable[str],
    find_layout_of: Callable[[list[str]], FolderLayout],
    several_labels: bool,
) -> Listing:
    """Lists the photos of a label file.

    Rows that cannot be used become photos with a problem. Several rows for one photo are used if
    they agree, or if photos can have several labels. Folders give the split of rows without one.

    Args:
      rows: the rows of the label file.
      find: returns the path of the photo that a row names; or None, and why it is not found.
      images: the paths of all photos, to count those without a row.
      find_layout_of: returns how the folders of some photos are read.
      several_labels: whether a photo can have several labels, or none.
    """
    by_path: dict[str, list[LabelRow]] = {}
    unusable = []
    seen = set()
    for row in rows:
        path, reason = find(row.file)
        problem = row.problem or reason
        seen.add(path)
        if path is None or problem:
            problem = f"{problem} (line {row.line})"
            unusable.append(ListedPhoto(path or "", (), problem=problem, name=row.file))
        else:
            by_path.setdefault(path, []).append(row)
    photos = [_of_rows(path, own, several_labels) for path, own in by_path.items()]
    origins = ["from the label file"] if any(photo.split for photo in photos) else []
    undecided = [photo.path for photo in photos if photo.split is None and not photo.problem]
    if undecided:
        layout = find_layout_of(undecided)
        origins.append(str(layout))
        photos = [
            photo if photo.split or photo.problem else _with_split_of_folder(photo, layout)
            for photo in photos
        ]
    photos = _with_one_split_per_group(photos)
    others = sorted(set(images) - seen)
    unlabelled = [photo.path for photo in photos if not photo.labels and not photo.problem]
    notes = [
        f"{_counted(paths)} {what}"
        for paths, what in ((others, "without a row in the label file"), (unlabelled, NO_LABEL))
        if paths
    ]
    return Listing(photos + unusable, " and ".join(origins), tuple(notes))


def all_images(tree: PhotoTree, folder: str) -> list[str]:
    """Returns the images in a folder, also those in its subfolders that are links."""
    below = (joined(folder, name) for name in tree.folders(folder) if not is_hidden(name))
    found = {*tree.images(folder), *(path for one in below for path in tree.images(one))}
    return sorted(found)


def _of_rows(path: str, rows: Sequence[LabelRow], several_labels: bool) -> ListedPhoto:
    """Combines the rows of one photo."""
    labels = tuple(dict.fromkeys(label for row in rows for label in row.labels))
    splits = {row.split for row in rows}
    groups = {row.group for row in rows}
    lines = " and ".join(str(row.line) for row in rows[:3])
    problem = None
    if not several_labels and len({row.labels for row in rows}) > 1:
        problem = f"different labels in lines {lines}: {', '.join(labels)}"
    elif not several_labels and not labels:
        problem = f"no label (line {lines})"
    elif len(splits) > 1 or len(groups) > 1:
        problem = f"different {'splits' if len(splits) > 1 else 'groups'} in lines {lines}"
    name = rows[0].file
    return ListedPhoto(path, labels, rows[0].split, name, rows[0].group, problem, name)


def _with_split_of_folder(photo: ListedPhoto, layout: FolderLayout) -> ListedPhoto:
    for part, split in layout.parts.items():
        if not part or photo.path.startswith(f"{part}/"):
            return photo._replace(split=split)
    return photo._replace(problem="no split: it is in a folder beside the folders of the splits")


def _with_one_split_per_group(photos: Sequence[ListedPhoto]) -> list[ListedPhoto]:
    """Marks the photos of each group for which several splits are given."""
    splits: dict[str | None, set[str | None]] = collections.defaultdict(set)
    for photo in photos:
        if photo.problem is None:
            splits[photo.group].add(photo.split)
    return [
        photo._replace(problem=f"its group {photo.group!r} is in several splits")
        if photo.group is not None and len(splits[photo.group] - {None}) > 1
        else photo
        for photo in photos
    ]


def _counted(paths: Sequence[str]) -> str:
    shown = ", ".join(map(printable, paths[:2])) + (", ..." if len(paths) > 2 else "")
    return f"{len(paths):,} {'image' if len(paths) == 1 else 'images'} ({shown})"
