"""Workers and resumed runs must have photos with the same names and contents."""

from __future__ import annotations

import shutil

import pytest

from research.data.folder.folder_source import FolderSource
from research.data.loader import DataLoader
from research.loop.agreement import check_data, describe_data, list_photos
from research.system.errors import UserError


def photos_in(folder) -> DataLoader:
    return DataLoader(16, 8, source=FolderSource(str(folder)))


def test_one_changed_photo_is_refused(photo_folder, tmp_path):
    copy = shutil.copytree(photo_folder, tmp_path / "copy")
    described = describe_data(photos_in(photo_folder))
    assert describe_data(photos_in(copy)) == described
    check_data(described, described)
    first, second = [entry.name for entry in list_photos(photos_in(copy))][:2]
    shutil.copy(copy / second, copy / first)
    changed = describe_data(photos_in(copy))
    assert [name for name in described if described[name] != changed[name]] == [
        "train_contents_sha256"
    ]
    with pytest.raises(UserError, match="different photos: train_contents_sha256 is"):
        check_data(changed, described)


def test_the_list_contains_each_training_and_validation_photo(photo_folder):
    loader = photos_in(photo_folder)
    listed = list_photos(loader)
    names = [*loader.examples("train").names, *loader.examples("validation").names]
    assert [entry.name for entry in listed] == names
    assert {entry.split for entry in listed} == {"train", "validation"}
    assert len({entry.digest for entry in listed}) == len(listed)
