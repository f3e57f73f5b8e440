"""Folders that contain links, pipes and unusual names."""

from __future__ import annotations

import csv
import io
import os
import shutil
import socket
from pathlib import Path

import pytest

from research.data.folder.folder_source import FolderSource
from research.data.source import MAX_FILE_BYTES, SPLITS
from research.data.split_arrays import load_split
from research.system.errors import UserError
from research.system.printable import csv_line, printable
from tests.helpers import draw_photos


def damaged_in(folder: Path) -> dict[str, str]:
    source = FolderSource(str(folder))
    loaded = [load_split(source, split, 16) for split in SPLITS]
    return {name: reason for examples in loaded for name, reason, _ in examples.damaged}


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn photos, and other files with an image suffix."""
    folder = draw_photos(tmp_path_factory.mktemp("odd"), 8)
    cat = folder / "cat"
    (cat / "folder.jpg").mkdir()
    shutil.copy(cat / "cat000.jpg", cat / "folder.jpg" / "within.jpg")
    (cat / "good link.jpg").symlink_to(folder / "dog" / "dog000.jpg")
    (cat / "dangling.jpg").symlink_to("nothing.jpg")
    (cat / "circle.jpg").symlink_to("circle.jpg")
    (cat / "round").symlink_to(folder, target_is_directory=True)
    (cat / ("long" * 62 + ".jpg")).write_bytes(b"")
    (cat / "two\nlines\x1b[2J.jpg").write_bytes(b"")
    (Path(os.fsdecode(os.fsencode(cat) + b"/caf\xe9.jpg"))).write_bytes(b"<html>")
    os.mkfifo(cat / "pipe.jpg")
    with (cat / "huge.jpg").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # sparse: it takes no disk space
    return folder


def test_each_unusable_file_is_reported_with_a_reason(odd_folder):
    assert damaged_in(odd_folder) == {
        "cat/folder.jpg": "a folder, not a file",
        "cat/dangling.jpg": "cannot be read: No such file or directory",
        "cat/circle.jpg": "cannot be read: Too many levels of symbolic links",
        f"cat/{'long' * 62}.jpg": "empty file",
        "cat/two\\nlines\\x1b[2J.jpg": "empty file",
        "cat/caf\\xe9.jpg": "not an image but an HTML page",
        "cat/pipe.jpg": "a pipe, socket or device, not a file",
        "cat/huge.jpg": "a file of more than 268,435,456 bytes",
    }


def test_photos_in_subfolders_and_linked_photos_are_used(odd_folder):
    source = FolderSource(str(odd_folder))
    names = {name for split in SPLITS for name in load_split(source, split, 16).names}
    assert {"cat/folder.jpg/within.jpg", "cat/good link.jpg"} <= names
    assert len(names) == 18
    assert not any("round" in name for name in names)


def test_a_socket_is_skipped(tmp_path, monkeypatch):
    folder = draw_photos(tmp_path, 8)
    monkeypatch.chdir(folder / "cat")  # the path of a socket has a short limit
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.jpg")
        assert damaged_in(folder) == {"cat/socket.jpg": "a pipe, socket or device, not a file"}


def test_a_class_folder_can_be_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "photos").mkdir()
    elsewhere = draw_photos(tmp_path / "elsewhere", 4)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).symlink_to(elsewhere / name)
    source = FolderSource(str(tmp_path / "photos"))
    assert sum(source.count(split) for split in SPLITS) == 8


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_a_file_without_permission_is_skipped(tmp_path):
    folder = draw_photos(tmp_path, 8)
    (folder / "cat" / "cat000.jpg").chmod(0)
    assert damaged_in(folder) == {"cat/cat000.jpg": "cannot be read: Permission denied"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_a_folder_without_permission_is_refused(tmp_path):
    folder = draw_photos(tmp_path, 8)
    (folder / "cat" / "mine").mkdir(mode=0)
    try:
        with pytest.raises(UserError, match=r"cat/mine', which cannot be read: Permission denied"):
            FolderSource(str(folder))
    finally:
        (folder / "cat" / "mine").chmod(0o700)


def test_names_are_printed_on_one_line():
    assert printable("caf\udce9.jpg") == "caf\\xe9.jpg"
    assert printable("a\r\n\x1b]0;title\x07.jpg") == "a\\r\\n\\x1b]0;title\\x07.jpg"
    assert printable("Kätzchen 猫.jpg") == "Kätzchen 猫.jpg"


def test_a_line_of_csv_is_read_back_with_all_kinds_of_line_breaks():
    cells = ["a\rb.jpg", "c\nd", "e\r\nf", 'say "x", y', "", "plain"]
    line = csv_line(cells)
    assert line.endswith(",,plain\n")
    assert list(csv.reader(io.StringIO(line, newline=""))) == [cells]
