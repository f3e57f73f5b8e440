"""Zip and tar files of photos, read without unpacking them."""

from __future__ import annotations

import io
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from research.data.folder.archive import ArchiveTree, is_archive
from research.data.folder.findings import find_copies
from research.data.folder.folder_source import FolderSource
from research.data.source import SPLITS
from research.data.split_arrays import load_split
from research.serving.predict import find_files
from research.system.errors import UserError
from tests.helpers import draw_photos


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("archives") / "photos"
    folder.mkdir()
    draw_photos(folder, 12)
    for file in (folder / "dog").iterdir():
        file.rename(file.with_suffix(""))
    (folder / "cat" / ".hidden.jpg").write_bytes(b"x")
    (folder / "cat" / "README").write_text("no image")
    return folder


@pytest.fixture(scope="module", params=["zip", "tar", "gztar", "bztar", "xztar"])
def archive(request, photos) -> str:
    name = str(photos.parent / f"of {request.param}")
    made = shutil.make_archive(name, request.param, photos.parent, "photos")
    return str(Path(made).rename(name))  # the content decides, not the name


def test_an_archive_is_read_as_its_folder(archive, photos):
    assert is_archive(archive)
    folder, source = FolderSource(str(photos)), FolderSource(archive)
    assert source.class_names == ("cat", "dog")
    for split in SPLITS:
        expected, found = load_split(folder, split, 16), load_split(source, split, 16)
        assert found.names == tuple(f"photos/{name}" for name in expected.names)
        assert found.digests == expected.digests
        np.testing.assert_array_equal(found.labels, expected.labels)
    assert sum(source.count(split) for split in SPLITS) == 24


def test_photos_of_an_archive_are_classified_by_name(archive):
    names = [photo.name for photo in find_files([archive])]
    assert len(names) == 24
    assert names[0] == f"{archive}/photos/cat/cat000.jpg"
    assert find_files([archive])[0].tree.read("photos/cat/cat000.jpg", 0).image.startswith(b"\xff")


def test_odd_members_of_a_zip_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "odd.zip", "w") as file:
        file.writestr("cat\\1.jpg", b"of Windows")
        file.writestr("./cat/2.jpg", b"2")
        file.writestr("/cat/../dog/3.jpg", b"3")
        file.writestr("__MACOSX/cat/._1.jpg", b"x")
        file.writestr("dog/4.jpg/5.jpg", b"5")
        file.writestr("empty/", b"")
    tree = ArchiveTree(str(tmp_path / "odd.zip"))
    found = {name: tree.read(name, 0) for name in tree.images("")}
    assert {name: example.image for name, example in found.items()} == {
        "cat/1.jpg": b"of Windows", "cat/2.jpg": b"2", "cat/dog/3.jpg": b"3",
        "dog/4.jpg": None, "dog/4.jpg/5.jpg": b"5",
    }  # fmt: skip
    assert found["dog/4.jpg"].problem == "a folder, not a file"
    assert tree.folders("") == ["__MACOSX", "cat", "dog", "empty"]
    assert tree.loose_images("dog") == []


def test_links_and_pipes_of_a_tar_file(tmp_path):
    with tarfile.open(tmp_path / "odd.tar", "w") as file:
        info = tarfile.TarInfo("cat/1.jpg")
        info.size = 3
        file.addfile(info, io.BytesIO(b"one"))
        for name, kind, target in (
            ("cat/2.jpg", tarfile.SYMTYPE, "1.jpg"),
            ("cat/3.jpg", tarfile.LNKTYPE, "cat/1.jpg"),
            ("cat/4.jpg", tarfile.SYMTYPE, "../gone.jpg"),
            ("cat/5.jpg", tarfile.FIFOTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            file.addfile(info)
    tree = ArchiveTree(str(tmp_path / "odd.tar"))
    assert [tree.read(f"cat/{n}.jpg", 0).image for n in (1, 2, 3)] == [b"one"] * 3
    assert tree.read("cat/4.jpg", 0).problem.startswith("cannot be read: ")
    assert tree.images("") == [f"cat/{n}.jpg" for n in (1, 2, 3, 4)]
    assert find_copies(tree, tree.images("")) == [[0, 1, 2]]


def test_a_photo_that_is_damaged_in_the_archive_is_named(tmp_path, photos):
    made = Path(shutil.make_archive(str(tmp_path / "photos"), "zip", photos))
    with zipfile.ZipFile(made) as file:
        place = file.getinfo("cat/cat003.jpg").header_offset + 60
    content = bytearray(made.read_bytes())
    content[place : place + 40] = bytes(40)
    made.write_bytes(content)
    source = FolderSource(str(made))
    found = [one for split in SPLITS for one in load_split(source, split, 16).damaged]
    ((name, reason, _),) = found
    assert name == "cat/cat003.jpg"
    assert reason.startswith("cannot be read: ")


def test_a_tar_file_that_ends_with_a_zip_file_is_read_as_a_tar_file(tmp_path, photos):
    shutil.make_archive(str(tmp_path / "inner"), "zip", photos / "cat")
    with tarfile.open(tmp_path / "photos.tar", "w") as file:
        file.add(photos, "photos")
        file.add(tmp_path / "inner.zip", "inner.zip")
    assert FolderSource(str(tmp_path / "photos.tar")).class_names == ("cat", "dog")


def _late_header(content: bytes) -> int:
    """Returns the place of a header in the second half of a tar file."""
    return content.index(b"./@PaxHeader", len(content) // 2)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        (
            "zip",
            lambda content: content[: len(content) // 2],
            "a file that is not a complete zip or tar file",
        ),
        ("gztar", lambda content: content[:30], "a file that is not a complete zip or tar file"),
        ("gztar", lambda content: content[:-200], "an archive that cannot be read"),
        ("tar", lambda content: content[: _late_header(content) + 100], "it ends too early"),
        ("zip", lambda content: b"text", "a file that is not a complete zip or tar file"),
    ],
)
def test_a_damaged_archive_is_refused_in_one_line(tmp_path, photos, name, change, expected):
    made = Path(shutil.make_archive(str(tmp_path / "photos"), name, photos))
    made.write_bytes(change(made.read_bytes()))
    with pytest.raises(UserError, match=expected) as caught:
        FolderSource(str(made))
    assert "\n" not in str(caught.value)
