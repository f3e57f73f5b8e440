"""Photos from a folder or an archive, with labels from folders, file names or a label file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research.data.folder.archive import ArchiveTree, is_archive
from research.data.folder.findings import (
    find_copies,
    note_copies,
    note_missing_classes,
    note_similar_names,
)
from research.data.folder.folder_layout import CLASS_FOLDERS, OTHER_LABELS
from research.data.folder.folder_options import FolderOptions
from research.data.folder.label_file import LabelRow, read_label_file
from research.data.folder.listed_photo import (
    ListedPhoto,
    Listing,
    list_by_folder,
    list_by_pattern,
    list_by_table,
)
from research.data.folder.photo_tree import FolderTree, PhotoTree
from research.data.folder.split_assignment import assign_splits, split_fraction
from research.data.source import SPLITS, Example, Source
from research.system.errors import UserError
from research.system.printable import printable


class FolderSource(Source):
    """The photos of a folder, of a zip or tar file, or of a label file.

    The classes are the names of folders, or come from file names or a label file. Splits are given
    by folders or by the label file, or chosen by `assign_splits`. Photos are ordered by the hash of
    their name, which mixes the classes. Labels are class indices; or, if photos can have several
    labels, arrays of 0 and 1 with one element per class.

    Args:
      folder: the folder or archive. None if the label file contains paths.
      options: how photos are labelled and split.

    Raises:
      UserError: the folder or label file does not exist or cannot be read, its names can be read in
        two ways, there are fewer than two classes, or a split has a class that the training photos
        do not have.
    """

    def __init__(self, folder: str | None, options: FolderOptions | None = None) -> None:
        options = options or FolderOptions()
        rows = read_label_file(options.labels, options.label_columns) if options.labels else None
        several = options.several_labels or any(len(row.labels) > 1 for row in rows or ())
        self._name = f"image_folder {folder!r}" if folder else f"labels {options.labels!r}"
        self._has_class_folders = rows is None and options.label_pattern is None
        try:
            if folder is None:
                folder, rows = _root_of(str(options.labels), rows or [])
            self._tree = _open_tree(folder)
            listing = self._list(options, rows, several)
        except OSError as error:
            raise UserError(
                f"{self._name} has {str(error.filename)!r}, which cannot be read: "
                f"{error.strerror}; make it readable, or move it elsewhere"
            ) from error
        usable = [photo for photo in listing.photos if photo.problem is None]
        names = sorted({label for photo in usable for label in photo.labels})
        copies = find_copies(self._tree, [photo.path for photo in usable])
        splits = assign_splits(usable, options.shares, copies)
        self._check_classes(usable, splits, names, listing)
        self.class_names = tuple(map(printable, names))
        index = {name: number for number, name in enumerate(names)}
        self._files: dict[str, list[tuple[float, str, Any]]] = {split: [] for split in SPLITS}
        for photo, split in zip(usable, splits, strict=True):
            labels = [index[label] for label in photo.labels]
            label = _as_vector(labels, len(names)) if several else labels[0]
            self._files[split].append((split_fraction(photo.key), photo.path, label))
        for listed in self._files.values():
            listed.sort(key=lambda entry: entry[:2])
        self._unusable = [photo for photo in listing.photos if photo.problem is not None]
        self._no_label: Any = _as_vector([], len(names)) if several else 0
        counts = ", ".join(f"{split} {len(self._files[split]):,}" for split in SPLITS)
        self.summary = f"{counts}; {listing.layout}"
        self.notes = (
            *listing.notes,
            *note_similar_names(self.class_names),
            *note_copies(usable, splits, copies),
            *note_missing_classes(usable, splits),
        )

    def _list(
        self, options: FolderOptions, rows: Sequence[LabelRow] | None, several: bool
    ) -> Listing:
        if rows is not None:
            return list_by_table(self._tree, options.folder_layout, rows, several)
        if options.label_pattern:
            return list_by_pattern(self._tree, options.folder_layout, options.label_pattern)
        return list_by_folder(self._tree, options.folder_layout)

    def count(self, split: str) -> int:
        if split in SPLITS:
            return len(self._files[split]) + (len(self._unusable) if split == "train" else 0)
        return len(self._listed(split))

    def examples(self, split: str) -> Iterator[Example]:
        for _, path, label in self._listed(split):
            yield self._tree.read(path, label)
        if split == "train":  # where the report of every training includes them
            for photo in self._unusable:
                name = printable(photo.path)
                yield Example(None, self._no_label, name, str(photo.problem))

    def _listed(self, split: str) -> list[tuple[float, str, Any]]:
        if split in SPLITS:
            return self._files[split]
        return [
            listed
            for part in _parts_of_splits(split, {name: len(self._files[name]) for name in SPLITS})
            for listed in self._files[part.splitname][part.from_ : part.to]
        ]

    def _check_classes(
        self,
        photos: Sequence[ListedPhoto],
        splits: Sequence[str],
        names: Sequence[str],
        listing: Listing,
    ) -> None:
        unusable = [photo for photo in listing.photos if photo.problem is not None]
        if len(names) < 2:
            found = f"images of {len(names)} class" if names else "no image"
            problem = (
                f" ({len(unusable):,} cannot be used, such as {unusable[0].path!r}, which "
                f"{unusable[0].problem})"
                if unusable
                else ""
            )
            if self._has_class_folders:
                part = next(iter(listing.layout.parts))
                where = f"the subfolders of its {part!r}" if part else "its subfolders"
                raise UserError(
                    f"{self._name} has {found} in {where}; {CLASS_FOLDERS}; {OTHER_LABELS}"
                )
            raise UserError(f"{self._name} has {found}{problem}; expected at least two classes")
        trained = {
            label
            for photo, split in zip(photos, splits, strict=True)
            if split == "train"
            for label in photo.labels
        }
        for photo, split in zip(photos, splits, strict=True):
            unknown = [label for label in photo.labels if label not in trained]
            if unknown:
                raise UserError(
                    f"{self._name} has the class {unknown[0]!r} in {photo.path!r} of the {split} "
                    "split, but in no training photo; expected the same classes in all splits"
                )


def _open_tree(folder: str) -> PhotoTree:
    if os.path.isdir(folder):
        return FolderTree(folder)
    if os.path.isfile(folder) and is_archive(folder):
        return ArchiveTree(folder)
    raise UserError(
        f"image_folder is {folder!r}; expected a folder that exists, or a zip or tar file"
    )


def _root_of(labels: str, rows: Sequence[LabelRow]) -> tuple[str, list[LabelRow]]:
    """Returns the folder that contains all files of a label file, and rows relative to it.

    Paths are relative to the folder of the label file, or to the working directory.
    """
    found = []
    for row in rows:
        places = (Path(labels).parent / row.file, Path(row.file).absolute())
        found.append(next((os.path.normpath(place) for place in places if place.is_file()), None))
    files = [file for file in found if file is not None]
    if not files:
        raise UserError(
            f"labels is {labels!r}, whose files, such as {rows[0].file!r}, do not exist in its "
            "folder; expected paths of photos: give --image_folder=DIR with the photos"
        )
    root = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    return root, [
        row._replace(file=os.path.relpath(file, root)) if file else row
        for row, file in zip(rows, found, strict=True)
    ]


def _as_vector(labels: Sequence[int], classes: int) -> np.ndarray:
    vector = np.zeros(classes, np.int32)
    vector[list(labels)] = 1
    return vector


def _parts_of_splits(expression: str, counts: Mapping[str, int]) -> list[Any]:
    """Returns the parts of splits that an expression names; see `tfds.core.ReadInstruction`.

    Raises:
      UserError: the expression is not one of TFDS, or names another split.
    """
    import tensorflow_datasets as tfds  # takes seconds to import

    known = {
        name: tfds.core.SplitInfo(
            name=name, shard_lengths=[count], num_bytes=0, filename_template=None
        )
        for name, count in counts.items()
    }
    try:
        return list(tfds.core.ReadInstruction.from_spec(expression).to_absolute(known))
    except Exception as error:  # TFDS raises many types for an expression that it cannot parse
        raise UserError(
            f"split is {expression!r}; expected {', '.join(counts)}, or a part such as "
            "'train[:10%]'"
        ) from error
