"""Photos from a folder with one subfolder per class, or per split and class."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from research.data.files import image_files, is_hidden
from research.data.folder_layout import CLASS_FOLDERS, find_layout
from research.data.source import SPLITS, Example, Source, read_example
from research.system.errors import UserError
from research.system.printable import name_of, path_of, printable


def split_fraction(name: str) -> float:
    """Returns a hash of the name in [0, 1)."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


class FolderSource(Source):
    """A folder with one subfolder of images per class, or with such a folder per split.

    `find_layout` decides which folders are splits. Without split folders, the hash of a photo's
    path below the class folder decides its split: 80 % train, 10 % validation, 10 % test. So the
    split of a photo does not change when other photos are added or removed. Existing split folders
    are kept. With `train` and one other split folder, the other is `test`, and the hash assigns
    10 % of `train` to validation. Photos are ordered by the hash, which mixes the classes.

    Raises:
      UserError: the folder does not exist or cannot be read, has fewer than two classes with
        images, or a split has a class that `train` does not have.
    """

    def __init__(self, folder: str) -> None:
        self._root = Path(folder)
        try:
            if not self._root.is_dir():
                raise UserError(f"image_folder is {folder!r}; expected a folder that exists")
            layout = find_layout(self._root)
            parts = layout.parts
            found = {part: _files_by_class(self._root / path_of(part)) for part in parts}
        except OSError as error:
            raise UserError(
                f"image_folder {folder!r} has {str(error.filename)!r}, which cannot be read: "
                f"{error.strerror}; make it readable, or move it elsewhere"
            ) from error
        names = sorted(next(iter(found.values())))
        _check_classes(folder, found, names)
        self.class_names = tuple(map(printable, names))
        self.summary = "; ".join([str(layout), *_similar(self.class_names)])
        self._files: dict[str, list[tuple[float, str, int]]] = {split: [] for split in SPLITS}
        for part, classes in found.items():
            for name, files in classes.items():
                for file in files:
                    within = self._root / path_of(part) / path_of(name)
                    fraction = split_fraction(name_of(file.relative_to(within)))
                    path = name_of(file.relative_to(self._root))
                    split = next(split for split, end in parts[part].items() if fraction < end)
                    self._files[split].append((fraction, path, names.index(name)))
        for listed in self._files.values():
            listed.sort()

    def count(self, split: str) -> int:
        return len(self._listed(split))

    def examples(self, split: str) -> Iterator[Example]:
        for _, path, label in self._listed(split):
            yield read_example(self._root / path_of(path), label, printable(path))

    def _listed(self, split: str) -> list[tuple[float, str, int]]:
        if split in SPLITS:
            return self._files[split]
        return [
            listed
            for part in _parts_of_splits(split, {name: len(self._files[name]) for name in SPLITS})
            for listed in self._files[part.splitname][part.from_ : part.to]
        ]


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


def _similar(names: Sequence[str]) -> list[str]:
    """Returns a note for the first two names that differ only in case."""
    folded: dict[str, str] = {}
    for name in names:
        other = folded.setdefault(name.casefold(), name)
        if other != name:
            return [f"the classes {other!r} and {name!r} differ only in case"]
    return []


def _folders(root: Path) -> list[Path]:
    return [
        child for child in sorted(root.iterdir()) if child.is_dir() and not is_hidden(child.name)
    ]


def _files_by_class(folder: Path) -> dict[str, list[Path]]:
    found = {name_of(Path(child.name)): image_files(child) for child in _folders(folder)}
    return {name: files for name, files in found.items() if files}


def _check_classes(
    folder: str, found: Mapping[str, Mapping[str, list[Path]]], names: list[str]
) -> None:
    part = next(iter(found))
    if len(names) < 2:
        images = f"images of {len(names)} class" if names else "no image"
        where = f"the subfolders of its {part!r}" if part else "its subfolders"
        raise UserError(f"image_folder {folder!r} has {images} in {where}; {CLASS_FOLDERS}")
    for other, classes in found.items():
        unknown = [name for name in classes if name not in names]
        if unknown:
            raise UserError(
                f"image_folder {folder!r} has the class {unknown[0]!r} in {other!r}, but not in "
                f"{part!r}; expected the same classes in both"
            )
