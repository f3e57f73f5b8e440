"""Folders as people have them: what is a split, what is a class, and what is neither."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from research.data.files import image_files
from research.data.folder.folder_layout import find_layout
from research.data.folder.folder_source import FolderSource
from research.data.folder.photo_tree import FolderTree
from research.data.source import SPLITS
from research.data.split_arrays import load_split
from research.system.errors import UserError
from tests.helpers import draw_photos


def make(root: Path, *paths: str) -> Path:
    """Makes empty files, and folders for paths that end in a slash.

    `{train,val}/cat/1.jpg` stands for a path for each of the names in braces.
    """
    for path in paths:
        before, brace, rest = path.partition("{")
        if brace:
            names, _, after = rest.partition("}")
            make(root, *(f"{before}{name}{after}" for name in names.split(",")))
        elif path.endswith("/"):
            (root / path).mkdir(parents=True, exist_ok=True)
        else:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).touch()
    return root


@pytest.mark.parametrize(
    ("paths", "parts", "left_out"),
    [
        # Classes.
        (["{cat,dog}/1.jpg"], {"": None}, ()),
        (["{cat,dog}/1.jpg", "7.jpg"], {"": None}, ("1 images without a class",)),
        (["{cat,dog}/1.jpg", "notes/a.txt"], {"": None}, ("notes (no image)",)),
        (["{crash_test_dummy,training_shoe}/1.jpg"], {"": None}, ()),
        # What archives unpack to.
        (["PetImages/{Cat,Dog}/1.jpg", "readme.txt"], {"PetImages": None}, ()),
        (["data/{train,val}/{cat,dog}/1.jpg"],
         {"data/train": "train", "data/val": "validation"}, ()),
        # Splits.
        (["{train,val}/{cat,dog}/1.jpg", "__MACOSX/"],
         {"train": "train", "val": "validation"}, ("__MACOSX",)),
        (["{train,val}/{cat,dog}/1.jpg", "__MACOSX/train/cat/._1.jpg"],
         {"train": "train", "val": "validation"}, ("__MACOSX",)),
        (["{train,val,test}/{cat,dog}/1.jpg"],
         {"train": "train", "val": "validation", "test": "test"}, ()),
        (["{train,val}/{cat,dog}/1.jpg", "extra/1.jpg"],
         {"train": "train", "val": "validation"}, ("extra (no split)",)),
        (["{training_set,test_set}/{cat,dog}/1.jpg"],
         {"training_set": "train", "test_set": "test"}, ()),
        (["{training,testing}/{cat,dog}/1.jpg"],
         {"training": "train", "testing": "test"}, ()),
        (["{train_images,test_images}/{cat,dog}/1.jpg", "add_images/1.jpg"],
         {"train_images": "train", "test_images": "test"}, ("add_images (no split)",)),
        (["seg_train/seg_train/{sea,street}/1.jpg", "seg_test/seg_test/{sea,street}/1.jpg",
          "seg_pred/seg_pred/1.jpg"],
         {"seg_train/seg_train": "train", "seg_test/seg_test": "test"},
         ("seg_pred (no split)",)),
        (["{TrainImages,TestImages}/{cat,dog}/1.jpg"],
         {"TrainImages": "train", "TestImages": "test"}, ()),
        (["{traindata,testdata}/{cat,dog}/1.jpg"], {"traindata": "train", "testdata": "test"}, ()),
        (["{val,test}/{cat,dog}/1.jpg"], {"val": "validation", "test": "test"}, ()),
        (["test/{cat,dog}/1.jpg"], {"test": "test"}, ()),
        (["train/{cat,dog}/1.jpg", "test/images/{1,2,3}.jpg", "test/images/notes/a.txt"],
         {"train": "train"}, ("test (3 images without a class)",)),
        (["train/{cat,dog}/1.jpg", "test/test/{1,2}.jpg"],
         {"train": "train"}, ("test (2 images without a class)",)),
        (["{train,test}/{cat,dog}/1.jpg", "train/fish/a.dng", "docs/a.txt"],
         {"train": "train", "test": "test"}, ("docs (no image)", "train/fish (no image)")),
        (["{camera1,camera2}/{day,night}/1.jpg", "camera1/2.jpg"], {"": None}, ()),
        (["{Train,VALID}/{cat,dog}/1.jpg"], {"Train": "train", "VALID": "validation"}, ()),
        (["{train2017,val2017}/{cat,dog}/1.jpg"],
         {"train2017": "train", "val2017": "validation"}, ()),
        (["train/{cat,dog}/1.jpg", "test/{1,2,3}.jpg"],
         {"train": "train"}, ("test (3 images without a class)",)),
        (["{train,test}/{cat,dog}/1.jpg", "train/7.jpg"],
         {"train": "train", "test": "test"}, ("1 images in train without a class",)),
    ],
)  # fmt: skip
def test_names_decide_on_splits_and_classes(tmp_path, paths, parts, left_out):
    layout = find_layout(FolderTree(str(make(tmp_path, *paths))))
    assert layout.parts == parts
    assert layout.left_out == left_out


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["{train,car,bus}/1.jpg"], "the folder 'train', the name of a split, beside 'bus'; expe"),
        (
            ["{fold0,fold1}/{cat,dog}/1.jpg"],
            "the same folders in 'fold0' and 'fold1', such as 'cat'",
        ),
        (
            ["{train_kaggle,test_own}/{cat,dog}/1.jpg"],
            "the same folders in 'test_own' and 'train_ka",
        ),
        (["train/{fold0,fold1}/{cat,dog}/1.jpg"], "the same folders in 'fold0' and 'fold1', such"),
        (["{cat,dog}/{train,test}/1.jpg"], "has folders of splits in the folder of a class, 'cat'"),
        (
            ["{trainA,trainB,testA,testB}/1.jpg"],
            "'testA' and 'testB', which both name the test split",
        ),
        (["{train,training,test}/{cat,dog}/1.jpg"], "'train' and 'training', which both name the"),
        (["{val,valid,train}/{cat,dog}/1.jpg"], "'val' and 'valid', which both name the validati"),
        (["train/{cat,dog}.{0,1,2}.jpg", "test/1.jpg"], "has 6 images and no class folder in 'tra"),
        (["test/{cat,dog}/1.jpg", "{cat,dog}/1.jpg"], "'test', the name of a split, beside 'cat'"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(tmp_path, paths, expected):
    with pytest.raises(UserError, match=expected) as caught:
        find_layout(FolderTree(str(make(tmp_path, *paths))))
    assert "\n" not in str(caught.value)


def test_copies_and_thumbnails_in_hidden_and_system_folders_are_left_out(tmp_path):
    make(tmp_path, *(f"{name}/{name}{n}.jpg" for name in ("cat", "dog") for n in range(20)))
    photos = image_files(tmp_path)
    make(
        tmp_path,
        "cat/.ipynb_checkpoints/cat_1-checkpoint.jpg",
        "cat/deep/.hidden/1.jpg",
        "dog/@eaDir/dog1.jpg/SYNOPHOTO_THUMB_M.jpg",
        "dog/__MACOSX/1.jpg",
        "dog/._dog1.jpg",
    )
    assert image_files(tmp_path) == photos
    source = FolderSource(str(tmp_path))
    assert sum(source.count(split) for split in SPLITS) == 40


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (["{cat,dog}/1.jpg"], "by a hash of each photo's name"),
        (["train/{cat,dog}/1.jpg"], "by a hash of each photo's name in train"),
        (["{train,val,test}/{cat,dog}/1.jpg", "a/b.txt"],
         "from the folders train and val and test; left out: a (no image)"),
    ],
)  # fmt: skip
def test_the_decision_in_one_line(tmp_path, paths, said):
    assert str(find_layout(FolderTree(str(make(tmp_path, *paths))))) == said


def test_what_was_decided_is_said(tmp_path):
    make(tmp_path, "{train,val}/{cat,Cat}/1.jpg", "extra/1.jpg")
    source = FolderSource(str(tmp_path))
    assert source.summary == (
        "train 2, validation 0, test 2; from the folders train and val; left out: extra (no split)"
    )
    assert source.notes == (
        "the classes 'Cat' and 'cat' differ only in case",
        "no photo is in the validation split, although its share is 10 %",
    )


def test_files_without_a_suffix_are_taken_by_their_content(tmp_path):
    photos = draw_photos(tmp_path, 12)
    expected = {Path(file.parent.name, file.stem) for file in image_files(photos)}
    for file in image_files(photos):
        file.rename(file.with_suffix(""))
    (photos / "cat" / "README").write_text("no image")
    (photos / "cat" / "empty").touch()
    os.mkfifo(photos / "cat" / "pipe")
    assert {file.relative_to(photos) for file in image_files(photos)} == expected
    source = FolderSource(str(photos))
    assert sum(source.count(split) for split in SPLITS) == 24
    assert len(load_split(source, "train", 16)) == source.count("train")
