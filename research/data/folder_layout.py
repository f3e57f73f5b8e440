"""Decides from names which folders are splits, which are classes, and which are neither."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from research.data.files import has_images, is_hidden, is_image
from research.system.errors import UserError
from research.system.printable import name_of, printable

# Words for a split, in the names that people and data sets give to its folder.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trainset"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "valset"), "validation"),
    **dict.fromkeys(("test", "testing", "testset"), "test"),
}
# Words that may stand beside it, as in `training_set` or `test_images`.
FILLERS = {"set", "split", "data", "dataset", "image", "images", "img", "imgs", "photo", "photos"}
WITHOUT_SPLITS = {"train": 0.8, "validation": 0.9, "test": 1.0}
CLASS_FOLDERS = (
    "expected one subfolder of images (JPEG, PNG, ...) per class, and at least two classes"
)


@dataclasses.dataclass(frozen=True)
class FolderLayout:
    """How a folder of photos is read.

    Attributes:
      parts: for each folder that contains class folders, by its path in the root, the splits with
        the end of their range of `split_fraction`. The folder of training photos comes first. It is
        "" if the root itself contains the classes.
      left_out: what is not used and would be expected to be, as text.
    """

    parts: Mapping[str, Mapping[str, float]]
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        (first, *others) = self.parts
        used = f"from {' and '.join(self.parts)}"
        if not others:
            used = f"by a hash of each photo's name{f' in {first}' if first else ''}"
        return f"{used}; left out: {', '.join(self.left_out)}" if self.left_out else used


@dataclasses.dataclass(frozen=True)
class _Folder:
    """A folder, its subfolders with images by name, and the number of images directly in it."""

    path: str
    children: Mapping[str, Path]
    images: int
    others: tuple[str, ...]  # subfolders without images


def find_layout(root: Path) -> FolderLayout:
    """Decides how a folder of photos is read.

    A folder is a split if its name is a word for a split, alone or with words such as `images`
    (`training_set`), or if another folder has the same name with another split (`seg_train` and
    `seg_test`). If there are folders for two splits or more, other folders are left out. A folder
    that contains nothing but one folder of classes or splits is entered.

    Args:
      root: an existing folder.

    Raises:
      UserError: the names can be read in two ways, or there are no classes.
      OSError: a folder cannot be read.
    """
    folder = _enter(_read(root, ""))
    splits = _splits_of(list(folder.children), root)
    left_out = list(folder.others)
    odd = [name for name in folder.children if name not in splits.values()]
    if not splits:
        return FolderLayout({folder.path: WITHOUT_SPLITS}, (*left_out, *_loose(folder)))
    if "train" not in splits or (odd and len(splits) == 1):
        name = splits.get("train", next(iter(splits.values())))
        beside = f"beside {odd[0]!r}" if odd else "without a folder of training photos"
        raise UserError(
            f"image_folder {str(root)!r} has the folder {name!r}, the name of a split, {beside}; "
            "expected only folders of classes, or folders of splits such as train and test: rename "
            "or move it"
        )
    left_out += [f"{name} (no split)" for name in odd] + _loose(folder)
    parts = {}
    for split, name in splits.items():
        part = _enter(_read(folder.children[name], _joined(folder.path, name)))
        if part.children:
            parts[split] = part.path
            left_out += _loose(part)
        elif split == "train":
            raise UserError(
                f"image_folder {str(root)!r} has {part.images:,} images and no class folder in "
                f"{part.path!r}; {CLASS_FOLDERS}"
            )
        else:
            left_out.append(f"{part.path} ({part.images:,} images without a class)")
    train = parts.pop("train")
    if set(parts) == {"validation", "test"}:
        ranges = {train: {"train": 1.0}, **{path: {split: 1.0} for split, path in parts.items()}}
    elif parts:
        (other,) = parts.values()
        ranges = {train: {"train": 0.9, "validation": 1.0}, other: {"test": 1.0}}
    else:
        ranges = {train: WITHOUT_SPLITS}
    return FolderLayout(ranges, tuple(left_out))


def _read(folder: Path, path: str) -> _Folder:
    children, others, images = {}, [], 0
    for child in sorted(folder.iterdir()):
        name = name_of(Path(child.name))
        if not child.is_dir():
            images += is_image(child.name)
        elif is_hidden(child.name):
            others += [] if name.startswith(".") else [printable(name)]
        elif has_images(child):
            children[name] = child
        else:
            others.append(f"{printable(name)} (no image)")
    return _Folder(path, children, images, tuple(others))


def _enter(folder: _Folder) -> _Folder:
    """Returns the folder inside one that contains nothing else, as archives unpack to."""
    while len(folder.children) == 1 and not folder.images:
        ((name, child),) = folder.children.items()
        inner = _read(child, _joined(folder.path, name))
        if len(inner.children) < 2:
            break
        folder = inner
    return folder


def _splits_of(names: list[str], root: Path) -> dict[str, str]:
    """Returns the folder of each split, `train` first."""
    read = {name: _words(name) for name in names}
    found: dict[str, str] = {}
    for name, (split, rest) in read.items():
        has_sibling = any(
            other not in (None, split) and own == rest for other, own in read.values()
        )
        if split is None or (rest and not has_sibling):
            continue
        if split in found:
            raise UserError(
                f"image_folder {str(root)!r} has the folders {found[split]!r} and {name!r}, which "
                f"both name the {split} split; expected one: rename or move the other"
            )
        found[split] = name
    return {split: found[split] for split in ("train", "validation", "test") if split in found}


def _words(name: str) -> tuple[str | None, tuple[str, ...]]:
    """Returns the split that a name contains, and its other words without `FILLERS`."""
    words = re.findall(r"[^\W\d_]+", name.lower())
    splits = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
    rest = tuple(word for word in words if word not in SPLIT_WORDS and word not in FILLERS)
    return (splits.pop() if len(splits) == 1 else None), rest


def _loose(folder: _Folder) -> list[str]:
    """Names the images of a folder that are in no class folder."""
    where = f" in {folder.path}" if folder.path else ""
    return [f"{folder.images:,} images{where} without a class"] if folder.images else []


def _joined(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name
