"""Photos from a folder or an archive, with labels from folders, file names or a label file."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from research.data.folder.archive import ArchiveTree, is_archive
from research.data.folder.findings import (
    find_copies,
    note_columns,
    note_copies,
    note_missing_classes,
    note_similar_names,
)
from research.data.folder.folder_layout import (
    CLASS_FOLDERS,
    OTHER_LABELS,
    FolderLayout,
    find_layout,
)
from research.data.folder.folder_options import FolderOptions
from research.data.folder.label_file import FileFinder, LabelRow, LabelTable, read_label_file
from research.data.folder.listed_photo import (
    ListedPhoto,
    Listing,
    all_images,
    list_by_folder,
    list_by_pattern,
    list_by_table,
)
from research.data.folder.photo_tree import Folders, FolderTree, ListedFolders, PhotoTree
from research.data.folder.split_assignment import assign_splits, split_fraction
from research.data.photo_cache import MANY_PHOTOS, PhotoCache
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

    random_access = True

    def __init__(self, folder: str | None, options: FolderOptions | None = None) -> None:
        self._options = options = options or FolderOptions()
        table = read_label_file(options.labels, options.label_columns) if options.labels else None
        several = options.several_labels or (
            table is not None and any(len(row.labels) > 1 for row in table.rows)
        )
        self._name = f"image_folder {folder!r}" if folder else f"labels {options.labels!r}"
        try:
            listing = self._list(folder, table, several)
        except OSError as error:
            raise UserError(
                f"{self._name} has {os.fsdecode(error.filename)!r}, which cannot be read: "
                f"{error.strerror}; make it readable, or move it elsewhere"
            ) from error
        usable = [photo for photo in listing.photos if photo.problem is None]
        self._unusable = [photo for photo in listing.photos if photo.problem is not None]
        names = sorted({label for photo in usable for label in photo.labels})
        paths = [photo.path for photo in usable]
        store = None
        if len(paths) >= MANY_PHOTOS:
            with contextlib.suppress(UserError):  # without a home folder, nothing is kept
                store = PhotoCache(folder=options.cache_dir).store
        states = [_short_digest(self._tree.state(path)) for path in paths]
        copies = find_copies(self._tree, paths, states, store)
        splits = assign_splits(usable, options.shares, copies)
        self._check_classes(usable, splits, names)
        self.class_names = tuple(map(printable, names))
        index = {name: number for number, name in enumerate(names)}
        self._files: dict[str, list[_File]] = {split: [] for split in SPLITS}
        for photo, split, state in zip(usable, splits, states, strict=True):
            labels = [index[label] for label in photo.labels]
            label = _as_vector(labels, len(names)) if several else labels[0]
            place = split_fraction(photo.key)
            file = _File(place, photo.path, printable(photo.name), label, state)
            self._files[split].append(file)
        for listed in self._files.values():
            listed.sort(key=lambda file: file[:2])
        self._no_label: Any = _as_vector([], len(names)) if several else 0
        counts = ", ".join(f"{split} {len(self._files[split]):,}" for split in SPLITS)
        self.summary = f"{counts}; {listing.origin}"
        self.notes = (
            *(note_columns(table, several) if table else []),
            *listing.notes,
            *note_similar_names(self.class_names),
            *note_copies(usable, splits, copies),
            *note_missing_classes(usable, splits, options.shares),
        )

    def _list(self, folder: str | None, table: LabelTable | None, several: bool) -> Listing:
        options = self._options
        has_classes = table is None and options.label_pattern is None

        def layout_of(folders: Folders) -> FolderLayout:
            layout = find_layout(folders, options.folder_layout, has_classes)
            return layout.with_test() if options.shares[2] else layout

        def layout_of_photos(paths: list[str]) -> FolderLayout:
            return layout_of(ListedFolders(self._tree.root, paths))

        if table is None:
            self._tree = _open_tree(str(folder))
            if options.label_pattern:
                return list_by_pattern(self._tree, layout_of(self._tree), options.label_pattern)
            return list_by_folder(self._tree, layout_of(self._tree))
        if folder is None:
            root, found = _find_beside(str(options.labels), table.rows)
            self._tree, images = FolderTree(root), list(found.values())

            def find(file: str) -> tuple[str | None, str]:
                return found.get(file), "" if file in found else "does not exist"

        else:
            self._tree = _open_tree(folder)
            images = all_images(self._tree, "")
            find = FileFinder(self._tree, images).find
        return list_by_table(table.rows, find, images, layout_of_photos, several)

    def count(self, split: str) -> int:
        if split in SPLITS:
            return len(self._files[split]) + len(self._known_unusable(split))
        return len(self._listed(split))

    def examples(self, split: str) -> Iterator[Example]:
        for _, path, name, label, _ in self._listed(split):
            yield self._tree.read(path, label)._replace(name=name)
        yield from self._known_unusable(split)

    def origin(self, split: str) -> str:
        digest = hashlib.sha256(repr(self.class_names).encode())
        for _, path, _, label, state in self._listed(split):
            line = f"{path}\0{label if isinstance(label, int) else label.tolist()}\0"
            digest.update(line.encode("utf-8", "surrogateescape") + state)
        for example in self._known_unusable(split):
            digest.update(f"{example.name}\0{example.problem}\0".encode())
        return digest.hexdigest()

    def listed(self, split: str) -> list[Example]:
        listed = [Example(b"", label, name) for _, _, name, label, _ in self._listed(split)]
        return [*listed, *self._known_unusable(split)]

    def read(self, split: str, index: int) -> Example:
        listed = self._listed(split)
        if index >= len(listed):
            return self._known_unusable(split)[index - len(listed)]
        _, path, name, label, _ = listed[index]
        return self._tree.read(path, label)._replace(name=name)

    def _known_unusable(self, split: str) -> list[Example]:
        """Returns the photos without a content; the report of every training includes them."""
        return [
            Example(None, self._no_label, printable(photo.name), str(photo.problem))
            for photo in (self._unusable if split == "train" else ())
        ]

    def _listed(self, split: str) -> list[_File]:
        if split not in self._files:  # an expression, whose photos are listed once
            counts = {name: len(self._files[name]) for name in SPLITS}
            self._files[split] = [
                listed
                for part in _parts_of_splits(split, counts)
                for listed in self._files[part.splitname][part.from_ : part.to]
            ]
        return self._files[split]

    def _check_classes(
        self, photos: Sequence[ListedPhoto], splits: Sequence[str], names: Sequence[str]
    ) -> None:
        if len(names) < 2:
            found = f"images of {len(names)} class" if names else "no image"
            if self._unusable:
                one = self._unusable[0]
                count = len(self._unusable)
                found += f" ({count:,} cannot be used, such as {one.name!r}: {one.problem})"
            expected = "expected at least two classes"
            if self._options.labels is None and self._options.label_pattern is None:
                found += " in its subfolders"
                expected = f"{CLASS_FOLDERS}; {OTHER_LABELS}"
            raise UserError(f"{self._name} has {found}; {expected}")
        trained = {
            label
            for photo, split in zip(photos, splits, strict=True)
            if split == "train"
            for label in photo.labels
        }
        for photo, split in zip(photos, splits, strict=True):
            unknown = [label for label in photo.labels if label not in trained]
            if unknown and trained:
                raise UserError(
                    f"{self._name} has the class {unknown[0]!r} in {photo.name!r} of the {split} "
                    "split, but in no training photo; expected the same classes in all splits: "
                    "move or rename this class"
                )


class _File(NamedTuple):
    """A photo of a split: the hash that orders it, its path, its name, its label and its state."""

    fraction: float
    path: str
    name: str
    label: Any
    state: bytes


def _short_digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _open_tree(folder: str) -> PhotoTree:
    if os.path.isdir(folder):
        return FolderTree(folder)
    if os.path.isfile(folder):
        if is_archive(folder):
            return ArchiveTree(folder)
        raise UserError(
            f"image_folder is {folder!r}, a file that is not a complete zip or tar file; expected "
            "a folder, or a zip or tar file of photos"
        )
    raise UserError(
        f"image_folder is {folder!r}; expected a folder that exists, or a zip or tar file"
    )


def _find_beside(labels: str, rows: Sequence[LabelRow]) -> tuple[str, dict[str, str]]:
    """Returns a folder, and the path in it of each file that a label file names.

    Paths are relative to the folder of the label file, or to the working directory.
    """
    found: dict[str, str] = {}
    for row in rows:
        places = (Path(labels).parent / row.file, Path(row.file).absolute())
        file = next((os.path.normpath(place) for place in places if place.is_file()), None)
        if file:
            found[row.file] = os.path.abspath(file)
    if not found:
        raise UserError(
            f"labels is {labels!r}, whose files, such as {rows[0].file!r}, do not exist in its "
            "folder; expected paths of photos: give --image_folder=DIR with the photos"
        )
    root = os.path.commonpath([os.path.dirname(file) for file in found.values()])
    return root, {name: os.path.relpath(file, root) for name, file in found.items()}


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
