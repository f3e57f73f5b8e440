"""Decides from names which folders are splits, which are classes, and which are neither."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence

from research.data.files import is_hidden
from research.data.folder.photo_tree import Folders, joined
from research.data.source import SPLITS
from research.system.errors import UserError
from research.system.printable import printable

# Words for a split, in the names that people and data sets give to its folder.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trainset"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "valset"), "validation"),
    **dict.fromkeys(("test", "testing", "testset"), "test"),
}
# Words that may stand beside it, as in `training_set` or `test_images`.
FILLERS = {"set", "split", "data", "dataset", "image", "images", "img", "imgs", "photo", "photos"}
_SPLIT_AND_FILLER = re.compile(
    rf"^({'|'.join(SPLIT_WORDS)})({'|'.join(sorted(FILLERS, key=len, reverse=True))})$"
)
MAX_NAMED = 5
CLASS_FOLDERS = (
    "expected one subfolder of images (JPEG, PNG, ...) per class, and at least two classes"
)
OTHER_LABELS = "for labels in file names or in a table, give --label_pattern=REGEX or --labels=FILE"


@dataclasses.dataclass(frozen=True)
class FolderLayout:
    """How a folder of photos is read.

    Attributes:
      parts: the folders whose photos are used, by their path in the root, each with its split. The
        part with the training photos comes first. Without splits, there is one part without a
        split; its path is "" if the root itself contains the photos.
      left_out: what is not used and would be expected to be, as text.
    """

    parts: Mapping[str, str | None]
    left_out: tuple[str, ...]

    def with_test(self) -> FolderLayout:
        """Returns a layout whose only folder of held-out photos is the test split."""
        if "test" in self.parts.values():
            return self
        return dataclasses.replace(
            self,
            parts={
                path: "test" if split == "validation" else split
                for path, split in self.parts.items()
            },
        )

    def __str__(self) -> str:
        (first, *others) = self.parts
        used = f"from the folders {' and '.join(map(printable, self.parts))}"
        if not others:
            used = f"by a hash of each photo's name{f' in {printable(first)}' if first else ''}"
            if self.parts[first] in SPLITS[1:]:
                used = f"from the folder {printable(first)}"
        if not self.left_out:
            return used
        more = len(self.left_out) - MAX_NAMED
        named = [*self.left_out[:MAX_NAMED], *([f"{more} more"] if more > 0 else [])]
        return f"{used}; left out: {', '.join(named)}"


@dataclasses.dataclass(frozen=True)
class _Folder:
    """A folder: its subfolders with images, the others as text, and the number of images in it."""

    path: str
    children: tuple[str, ...]
    others: tuple[str, ...]
    images: int


def find_layout(tree: Folders, given: str = "auto", has_classes: bool = True) -> FolderLayout:
    """Decides how a folder of photos is read.

    A folder is a split if its name is a word for a split, alone or with words such as `images`
    (`training_set`), or if another folder has the same name with another split (`seg_train` and
    `seg_test`). If there are folders for two splits or more, other folders are left out. A folder
    that contains nothing but one folder of classes or splits is entered.

    Args:
      tree: the folder or archive.
      given: 'classes' if no folder is a split, 'splits' if all folders that are no splits are left
        out, 'auto' to decide by the names.
      has_classes: whether the photos of a class are in a folder. Otherwise, the labels have another
        source, and the folders in a part are not classes.

    Raises:
      UserError: the names can be read in two ways, or there are no classes.
      OSError: a folder cannot be read.
    """
    folder = _enter(tree, _read(tree, ""), has_classes)
    left_out = [*folder.others, *(_loose(folder) if has_classes else [])]
    splits = {} if given == "classes" else _splits_of(folder.children, tree.root)
    if splits:
        return _layout_of_splits(tree, folder, splits, left_out, given, has_classes)
    alone = None if given == "classes" else split_named(folder.path.rpartition("/")[2])
    if given == "splits" and not alone:
        raise UserError(
            f"folder_layout is 'splits', but no folder of image_folder {tree.root!r} has the name "
            "of a split; expected folders such as train and test"
        )
    if has_classes and given == "auto":
        _check_classes(tree, folder)
    return FolderLayout({folder.path: alone}, tuple(left_out))


def _layout_of_splits(
    tree: Folders,
    folder: _Folder,
    splits: Mapping[str, str],
    left_out: list[str],
    given: str,
    has_classes: bool,
) -> FolderLayout:
    """Decides how a folder with folders of splits is read; see `find_layout`."""
    odd = [name for name in folder.children if name not in splits.values()]
    if odd and given == "auto" and (len(splits) == 1 or "train" not in splits):
        name = splits.get("train", next(iter(splits.values())))
        raise UserError(
            f"image_folder {tree.root!r} has the folder {name!r}, the name of a split, beside "
            f"{odd[0]!r}; expected only folders of classes, or folders of splits such as train and "
            "test: rename it, or give --folder_layout=classes or --folder_layout=splits"
        )
    left_out = [*left_out, *(f"{printable(name)} (no split)" for name in odd)]
    parts: dict[str, str | None] = {}
    classes: set[str] = set()
    for split, name in splits.items():
        part = _enter(tree, _read(tree, joined(folder.path, name)), has_classes)
        if not has_classes:
            parts[part.path] = split
            continue
        if split == "train":
            classes.update(part.children)
        left_out += part.others
        # Photos without a class may be in a subfolder of any name.
        if part.children and (not classes or classes & set(part.children)):
            parts[part.path] = split
            left_out += _loose(part)
            inner = _splits_of(part.children, tree.root)
            if inner and given == "auto":
                raise UserError(
                    f"image_folder {tree.root!r} has {joined(part.path, inner.popitem()[1])!r}, "
                    "a folder with the name of a split in the folder of a split; expected folders "
                    "of classes: rename it, or give --folder_layout=splits"
                )
        elif split == "train":
            raise UserError(
                f"image_folder {tree.root!r} has {part.images:,} images and no class folder in "
                f"{part.path!r}; {CLASS_FOLDERS}; {OTHER_LABELS}"
            )
        else:
            count = len(tree.images(part.path))
            left_out.append(f"{printable(part.path)} ({count:,} images without a class)")
    return FolderLayout(parts, tuple(left_out))


def _read(tree: Folders, path: str) -> _Folder:
    children: list[str] = []
    others: list[str] = []
    for name in tree.folders(path):
        if is_hidden(name):
            others += [] if name.startswith(".") else [printable(name)]
        elif tree.has_images(joined(path, name)):
            children.append(name)
        else:
            others.append(f"{printable(joined(path, name))} (no image)")
    return _Folder(path, tuple(children), tuple(others), len(tree.loose_images(path)))


def _enter(tree: Folders, folder: _Folder, has_classes: bool) -> _Folder:
    """Returns the folder inside one that contains nothing else, as archives unpack to."""
    while len(folder.children) == 1 and not folder.images:
        inner = _read(tree, joined(folder.path, folder.children[0]))
        if len(inner.children) < 2 and (has_classes or inner.images):
            break
        folder = dataclasses.replace(inner, others=(*folder.others, *inner.others))
    return folder


def _check_classes(tree: Folders, folder: _Folder) -> None:
    """Raises `UserError` if the folders of classes may be something else.

    They are not if they contain folders of splits, or if all of them contain the same folders and
    no images, as folds, cameras, or splits in another language do.
    """
    inner = {name: tree.folders(joined(folder.path, name)) for name in folder.children}
    for name, children in inner.items():
        splits = {split for child in children if (split := split_named(child))}
        if len(splits) > 1:
            raise UserError(
                f"image_folder {tree.root!r} has folders of splits in the folder of a class, "
                f"{joined(folder.path, name)!r}; expected folders of classes in the folders of "
                "splits (train/cat): move them, or give --folder_layout=classes to use the photos "
                "of all of them without their splits"
            )
    shared = [
        tuple(child for child in children if not is_hidden(child)) for children in inner.values()
    ]
    if len(shared) > 1 and len(shared[0]) > 1 and len(set(shared)) == 1:
        if any(tree.loose_images(joined(folder.path, name)) for name in inner):
            return
        first, second = folder.children[:2]
        raise UserError(
            f"image_folder {tree.root!r} has the same folders in {first!r} and {second!r}, such as "
            f"{shared[0][0]!r}; expected folders of classes, or folders of splits with names such "
            "as train and test: rename them, or give --folder_layout=classes if "
            f"{first!r} and {second!r} are classes"
        )


def _splits_of(names: Sequence[str], root: str) -> dict[str, str]:
    """Returns the folder of each split, `train` first."""
    read = {name: _words(name) for name in names}
    siblings: dict[tuple[str, ...], set[str]] = collections.defaultdict(set)
    for split, rest in read.values():
        if split:
            siblings[rest].add(split)
    found: dict[str, str] = {}
    for name, (split, rest) in read.items():
        if split is None or (rest and len(siblings[rest]) == 1):
            continue
        if split in found:
            raise UserError(
                f"image_folder {root!r} has the folders {found[split]!r} and {name!r}, which both "
                f"name the {split} split; expected one: rename or move the other, or give "
                "--folder_layout=classes"
            )
        found[split] = name
    return {split: found[split] for split in SPLITS if split in found}


def _words(name: str) -> tuple[str | None, tuple[str, ...]]:
    """Returns the split that a name contains, and its other words without `FILLERS`."""
    # "TrainImages" and "trainA" are two words, and so is "traindata".
    parts = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[^\W\d_A-Z])(?=[A-Z])", "_", name))
    separated = (_SPLIT_AND_FILLER.sub(r"\1 \2", part.lower()) for part in parts)
    words = " ".join(separated).split()
    splits = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
    rest = tuple(word for word in words if word not in SPLIT_WORDS and word not in FILLERS)
    return (splits.pop() if len(splits) == 1 else None), rest


def split_named(name: str) -> str | None:
    """Returns the split that a name stands for, such as `train` for "Training Set"; else None."""
    split, rest = _words(name)
    return None if rest else split


def _loose(folder: _Folder) -> list[str]:
    """Names the images of a folder that are in no class folder."""
    where = f" in {printable(folder.path)}" if folder.path else ""
    return [f"{folder.images:,} images{where} without a class"] if folder.images else []
