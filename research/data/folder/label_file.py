"""Reads labels, splits and groups of photos from a CSV or TSV file."""

from __future__ import annotations

import csv
import io
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from research.data.folder.folder_layout import split_named
from research.data.folder.photo_tree import PhotoTree
from research.data.source import SEPARATOR, read_example
from research.system.errors import UserError
from research.system.printable import printable

# Usual names of the columns, in lower case and without spaces and punctuation.
USUAL_NAMES: Mapping[str, frozenset[str]] = {
    "file": frozenset(
        {"file", "filename", "filepath", "path", "image", "images", "imageid", "imagename", "id"}
        | {"imagepath", "imagefile", "img", "imgname", "photo", "photoid", "fname", "name"}
    ),
    "label": frozenset(
        {"label", "labels", "class", "classes", "classname", "category", "categories", "target"}
        | {"targets", "tag", "tags", "species", "breed"}
    ),
    "split": frozenset({"split", "set", "subset", "partition", "phase"}),
    "group": frozenset(
        {"group", "groupid", "patient", "patientid", "subject", "subjectid", "person", "personid"}
        | {"video", "videoid", "burst", "burstid", "sequence", "sequenceid", "scene", "sceneid"}
    ),
}
REQUIRED = ("file", "label")
DELIMITERS = (",", ";", "\t")
_EXPECTED = "expected a CSV or TSV file with a header and columns such as file and label"


class LabelRow(NamedTuple):
    """A row of a label file.

    Attributes:
      line: its line in the file, counted from 1.
      file: the name or path of the photo, with "/" between names.
      labels: the names of its classes. It may be empty.
      split: train, validation or test; None if the row has no split.
      group: photos of the same group are in the same split; None if the row has no group.
      problem: why the row cannot be used; None if it can.
    """

    line: int
    file: str
    labels: tuple[str, ...]
    split: str | None = None
    group: str | None = None
    problem: str | None = None


class LabelTable(NamedTuple):
    """The rows of a label file, and the names of the columns that are used, by use."""

    rows: list[LabelRow]
    columns: Mapping[str, str]


def read_label_file(path: str, columns: str | None = None) -> LabelTable:
    """Reads a table with a header, as spreadsheets and pandas write it.

    The text is UTF-8, or UTF-16 with a byte-order mark. The delimiter is a comma, a semicolon or a
    tab. Several labels of a photo are separated by semicolons.

    Args:
      path: the file.
      columns: names of columns, such as 'file=picture,label=bird'. Columns that are not named
        here are found by `USUAL_NAMES`. An empty name, as in 'split=', leaves a column out.

    Raises:
      UserError: the file cannot be read, or its columns are not known.
    """
    text = _read_text(path)
    skipped_lines = 0
    if text.lower().startswith("sep="):  # a line that Excel writes and reads
        text, skipped_lines = text.partition("\n")[2], 1
    header = text.partition("\n")[0]
    if not header.strip():
        raise UserError(f"labels is {path!r}, whose first line is empty; {_EXPECTED}")
    delimiter = max(DELIMITERS, key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[LabelRow] = []
    try:
        names = [cell.strip() for cell in next(reader, [])]
        columns_used = _find_columns(path, names, columns)
        for cells in reader:
            if any(cell.strip() for cell in cells):
                line = skipped_lines + reader.line_num
                rows.append(_row(line, cells, len(names), columns_used))
    except csv.Error as error:
        raise UserError(
            f"labels is {path!r}, which is not a table ({error}); {_EXPECTED}"
        ) from None
    if not rows:
        raise UserError(f"labels is {path!r}, which has no rows after its header; {_EXPECTED}")
    return LabelTable(rows, {use: names[index] for use, index in columns_used.items()})


def _read_text(path: str) -> str:
    stored = read_example(Path(path), 0, path)  # neither pipes nor devices
    if stored.image is None:
        raise UserError(f"labels is {path!r}: {stored.problem}; {_EXPECTED}")
    content = bytes(stored.image)
    is_utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    if not is_utf16 and b"\0" in content:
        raise UserError(f"labels is {path!r}, which is not text; save it as UTF-8; {_EXPECTED}")
    try:
        return content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"labels is {path!r}, whose line {line} is not UTF-8 text; save it as UTF-8 (in Excel: "
            "as 'CSV UTF-8')"
        ) from error


def _find_columns(path: str, names: Sequence[str], given: str | None) -> dict[str, int]:
    """Returns the index of each column that is used."""
    chosen: dict[str, str] = {}
    for part in filter(None, (given or "").split(",")):
        use, equals, name = part.partition("=")
        if not equals or use not in USUAL_NAMES or (name and name not in names):
            raise UserError(
                f"label_columns is {given!r}; expected {', '.join(USUAL_NAMES)} and the names of "
                f"columns of {path!r}, such as 'file={names[0]}'; it has the columns "
                f"{', '.join(map(repr, names[:20]))}"
            )
        chosen[use] = name
    doubled = [name for name in names if name and names.count(name) > 1]
    if doubled:
        raise UserError(
            f"labels is {path!r}, which has two columns named {doubled[0]!r}; rename one of them"
        )
    found: dict[str, int] = {}
    for use, usual in USUAL_NAMES.items():
        if use in chosen:
            matching = [chosen[use]] if chosen[use] else []
        else:
            matching = [name for name in names if re.sub(r"[\W_]", "", name).lower() in usual]
        if len(matching) > 1:
            raise UserError(
                f"labels is {path!r}, whose columns {' and '.join(map(repr, matching))} may both "
                f"be the {use}; name one of them, such as --label_columns='{use}={matching[0]}'"
            )
        if not matching and use in REQUIRED:
            raise UserError(
                f"labels is {path!r}, which has the columns {', '.join(map(repr, names[:20]))}; "
                f"expected a column for the {use}: name it with --label_columns='{use}=NAME'"
            )
        if matching:
            found[use] = names.index(matching[0])
    return found


def _row(line: int, cells: Sequence[str], width: int, columns: Mapping[str, int]) -> LabelRow:
    def cell(use: str) -> str:
        index = columns.get(use, len(cells))
        return cells[index].strip() if index < len(cells) else ""

    split = cell("split")
    word = split_named(split)
    problem = None
    if len(cells) > width and any(cells[width:]):
        problem = f"{len(cells)} cells, and the header has {width}"
    elif not cell("file"):
        problem = "no file name"
    elif split and word is None:
        problem = (
            f"unknown split {split!r}; expected train, validation or test, or "
            "--label_columns=split= to ignore the column"
        )
    labels = tuple(dict.fromkeys(filter(None, map(str.strip, cell("label").split(SEPARATOR)))))
    file = cell("file").replace("\\", "/")
    return LabelRow(line, file, labels, word, cell("group") or None, problem)


class FileFinder:
    """Finds the photos that a label file names, among the photos of a folder or archive.

    A name may be the path of a photo, the end of its path, or its file name, each with or without
    its suffix. A longer path must contain the name of the folder or archive before it. Lower and
    upper case, and the forms of accents that file systems use, are the same.

    Args:
      tree: the folder or archive.
      images: the paths of all photos.
    """

    def __init__(self, tree: PhotoTree, images: Iterable[str]) -> None:
        self._tree = tree
        self._root = _plain(os.path.basename(os.path.abspath(tree.root)))
        self._images = set(images)
        self._by_name: dict[str, list[str]] = {}
        for image in self._images:
            name = _plain(image.rpartition("/")[2])
            for key in {name, name.rpartition(".")[0] or name}:
                self._by_name.setdefault(key, []).append(image)

    def find(self, file: str) -> tuple[str | None, str]:
        """Returns the path of a photo; or None, and why it is not found."""
        path = file.removeprefix("./")
        if path in self._images:
            return path, ""
        wanted = [part for part in _plain(path).split("/") if part not in ("", ".")]
        candidates = self._by_name.get(wanted[-1], []) if wanted else []
        fitting = [image for image in candidates if self._fits(image, wanted)]
        if len(fitting) > 1:
            name = path.rpartition("/")[2]
            exact = [image for image in fitting if image.rpartition("/")[2] == name]
            fitting = exact if len(exact) == 1 else fitting
        if len(fitting) == 1:
            return fitting[0], ""
        if fitting:
            first, second = map(printable, sorted(fitting)[:2])
            return None, f"names several photos, such as {first} and {second}"
        if self._tree.size(path) is not None:  # hidden, linked, or of another suffix
            return path, ""
        return None, "names no photo of the folder"

    def _fits(self, image: str, wanted: list[str]) -> bool:
        parts = _plain(image).split("/")[:-1]
        folders = wanted[:-1]
        if len(folders) <= len(parts):
            return parts[len(parts) - len(folders) :] == folders
        inner = len(folders) - len(parts)
        return folders[inner:] == parts and folders[inner - 1] == self._root


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
