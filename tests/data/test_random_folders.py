"""Random folders and archives: every photo is used once, or named."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from research.data.files import is_hidden
from research.data.folder.folder_layout import SPLIT_WORDS
from research.data.folder.folder_source import FolderSource
from research.data.source import SPLITS
from research.system.errors import UserError
from research.system.printable import printable

FOLDERS = st.sampled_from(
    [*("train", "val", "Test", "valid", "testing", "train_images", "test_images", "seg_train"),
     *("seg_test", "cat", "Cat", "dog", "bird", "PetImages", "extra", "train car", "test\n2"),
     *(".hidden", "__MACOSX", "@eaDir", ".ipynb_checkpoints", "é", "x.jpg")]
)  # fmt: skip
FILES = st.sampled_from(["1.jpg", "2.PNG", "3", "notes.txt", ".4.jpg", "5.jpg", "é.jpg", "-.jpg"])
PATHS = st.builds(
    lambda folders, file: "/".join([*folders, file]), st.lists(FOLDERS, max_size=4), FILES
)
STYLES = st.sampled_from(
    [(), ("train", "val"), ("Train", "valid", "test"), ("train_images", "test_images"),
     ("seg_train/seg_train", "seg_test/seg_test"), ("train",), ("test", "val")]
)  # fmt: skip
CLASSES = st.lists(st.sampled_from(["cat", "Cat", "dog", "é"]), min_size=2, unique=True)


def tree(
    wrapper: str, splits: Sequence[str], classes: Sequence[str], count: int, noise: Sequence[str]
) -> list[str]:
    """The paths of a folder as people have them, and some others."""
    photos = [
        "/".join(filter(None, (wrapper, split, name, f"{split[:2]}{number}.jpg")))
        for split in splits or [""]
        for name in classes
        for number in range(count)
    ]
    return [*photos, *noise]


TREES = st.builds(
    tree,
    st.sampled_from(["", "", "PetImages", "data"]),
    STYLES,
    CLASSES,
    st.integers(1, 4),
    st.lists(PATHS, max_size=3, unique=True),
)


def make(root: Path, paths: Sequence[str]) -> None:
    for path in paths:
        try:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(path.encode())
        except (FileExistsError, NotADirectoryError):
            pass  # a file and a folder of the same name


def read(root: Path) -> tuple[object, ...]:
    """The photos of each split with their labels, and what is said; or the refusal."""
    try:
        source = FolderSource(str(root))
    except UserError as error:
        return (str(error).replace(str(root), "ROOT"),)
    listed = tuple(
        tuple((one.name, source.class_names[one.label]) for one in source.examples(split))
        for split in SPLITS
    )
    return source.class_names, listed, source.summary, source.notes


@settings(max_examples=30, deadline=None, database=None, derandomize=True)
@given(TREES, st.booleans())
@example(["cat/1.jpg", "dog/1.jpg", "extra/x.jpg/1.jpg"], False)
@example(["train/cat/1.jpg", "train/dog/1.jpg", "Test/5.jpg", "extra/1.jpg"], False)
def test_each_photo_is_used_once_or_named(paths, has_links):
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, "first"), Path(folder, "second")
        make(first, paths)
        if has_links:  # a class that is a link, a link inside a class, and a cycle
            add_links(first)
        found = read(first)
        # Some file systems list entries in the order, others in the reverse order of creation.
        make(second, sorted(paths, reverse=True))
        if not has_links and sorted(second.rglob("*")) == [
            second / file.relative_to(first) for file in sorted(first.rglob("*"))
        ]:
            assert read(second) == found
        for form in () if has_links else ("zip", "gztar"):
            archive = Path(shutil.make_archive(str(Path(folder, "photos")), form, first))
            of_archive = [str(one).replace(str(archive), "ROOT") for one in read(archive)]
            assert of_archive == list(map(str, found))
        if len(found) == 1:
            assert "\n" not in str(found[0])
            return
        class_names, listed, summary, _ = found
        names = [name for split in listed for name, _ in split]
        assert len(names) == len(set(names))
        assert not [name for name in class_names if name.lower() in SPLIT_WORDS]
        for name, label in (entry for split in listed for entry in split):
            assert label in name.split("/")
        left_out = summary.partition("left out: ")[2]
        for file in first.rglob("*"):
            path = file.relative_to(first)
            is_image = path.suffix.lower() in (".jpg", ".png") and not path.name.startswith(".")
            if file.is_dir() or not is_image or any(map(is_hidden, path.parts)):
                continue
            is_named = "images without a class" in left_out or any(
                f"{where} (" in left_out or f"images in {where} without" in left_out
                for where in (printable(parent.as_posix()) for parent in path.parents)
            )
            assert printable(path.as_posix()) in names or is_named


def add_links(root: Path) -> None:
    (root / "linked").symlink_to("cat")
    (root / "loop").symlink_to(".")
    for folder in root.iterdir():
        if folder.is_dir() and not folder.is_symlink():
            (folder / "back").symlink_to("..")
