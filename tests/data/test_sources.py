from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits

from research.data.built_in import sketches
from research.data.decode import decode_image
from research.data.folder.findings import find_copies
from research.data.folder.folder_source import FolderSource
from research.data.folder.photo_tree import FolderTree
from research.data.open_source import open_source
from research.data.source import SPLITS, Example
from research.data.targets import join_targets, stack_targets
from research.data.tfds_source import TfdsSource, standard_splits
from research.system.errors import UserError
from tests.helpers import ROOT, draw_photos


def names(source, split):
    return [example.name for example in source.examples(split)]


def test_folder_splits_are_disjoint_and_complete(photo_folder):
    source = FolderSource(str(photo_folder))
    found = [names(source, split) for split in SPLITS]
    everything = sorted(
        path.relative_to(photo_folder).as_posix() for path in photo_folder.rglob("*.jpg")
    )
    assert sorted(itertools.chain(*found)) == everything
    assert [source.count(split) for split in SPLITS] == [len(part) for part in found]


def draw_splits(root: Path, *parts: str) -> Path:
    for part in parts:
        (root / part).mkdir(parents=True)
        draw_photos(root / part, 30)
    return root


@pytest.mark.parametrize("names_of_parts", [("train", "val", "test"), ("Train", "valid", "test")])
def test_existing_split_folders_are_kept(tmp_path, names_of_parts):
    source = FolderSource(str(draw_splits(tmp_path, *names_of_parts)))
    assert source.class_names == ("cat", "dog")
    for split, part in zip(SPLITS, names_of_parts, strict=True):
        assert {name.split("/")[0] for name in names(source, split)} == {part}
        assert source.count(split) == 60
        labels = {(example.name.split("/")[1], example.label) for example in source.examples(split)}
        assert labels == {("cat", 0), ("dog", 1)}


@pytest.mark.parametrize("other", ["validation", "test"])
def test_with_one_held_out_split_validation_is_a_tenth_of_train(tmp_path, other):
    source = FolderSource(str(draw_splits(tmp_path, "train", other)))
    assert {name.split("/")[0] for name in names(source, "test")} == {other}
    assert source.count("test") == 60
    assert 0 < source.count("validation") < 20
    assert source.count("train") + source.count("validation") == 60
    assert {name.split("/")[0] for name in names(source, "validation")} == {"train"}


def test_a_train_folder_alone_is_split_as_a_folder_without_splits(tmp_path):
    whole = FolderSource(str(draw_splits(tmp_path, "train")))
    inner = FolderSource(str(tmp_path / "train"))
    for split in SPLITS:
        assert names(whole, split) == [f"train/{name}" for name in names(inner, split)]


def test_a_class_that_train_does_not_have_is_refused(tmp_path):
    draw_splits(tmp_path, "train", "test")
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "bird")
    with pytest.raises(
        UserError,
        match=r"has the class 'bird' in 'test/bird/.*' of the test split, but in no training photo",
    ):
        FolderSource(str(tmp_path))


def test_a_photo_keeps_its_split_when_photos_of_other_classes_are_added(tmp_path):
    folder = draw_photos(tmp_path, 12)
    before = {name: split for split in SPLITS for name in names(FolderSource(str(folder)), split)}
    for index in range(30):
        (folder / "dog" / f"other{index}.jpg").write_bytes(bytes(200 + index))
    after = {name: split for split in SPLITS for name in names(FolderSource(str(folder)), split)}
    for name in (name for name in before if name.startswith("cat")):
        assert before[name] == after[name]


def test_labels_follow_the_sorted_class_folders(photo_folder):
    source = FolderSource(str(photo_folder))
    assert source.class_names == ("cat", "dog")
    for example in source.examples("train"):
        assert example.name.startswith(source.class_names[example.label])


def test_stored_order_mixes_the_classes(photo_folder):
    labels = [example.label for example in FolderSource(str(photo_folder)).examples("train")]
    assert 0 < sum(labels[:10]) < 10


def test_a_file_that_cannot_be_read_is_yielded_without_content(tmp_path):
    folder = draw_photos(tmp_path, 8)
    source = FolderSource(str(folder))
    shutil.rmtree(folder / "cat")
    contents = {example.name: example.image for s in SPLITS for example in source.examples(s)}
    assert all(content is None for name, content in contents.items() if name.startswith("cat"))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda folder: None, "no image in its subfolders"),
        (lambda folder: (folder / "cat").mkdir(), "no image in its subfolders"),
        (lambda folder: shutil.rmtree(draw_photos(folder, 1) / "dog"), "images of 1 class in its"),
    ],
)
def test_a_folder_without_two_classes_is_refused(tmp_path, make, expected):
    make(tmp_path)
    with pytest.raises(UserError, match=expected):
        FolderSource(str(tmp_path))


def test_names_that_are_not_utf8_can_be_printed(tmp_path):
    folder = draw_photos(tmp_path, 8)
    Path(os.fsdecode(os.fsencode(folder / "cat") + b"/caf\xe9.jpg")).write_bytes(b"content")
    examples = {x.name: x for s in SPLITS for x in FolderSource(str(folder)).examples(s)}
    assert examples["cat/caf\\xe9.jpg"].image == b"content"


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected a folder that exists"):
        FolderSource(str(tmp_path / "nowhere"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every folder")
def test_an_unreadable_folder_is_refused(tmp_path):
    tmp_path.chmod(0)
    try:
        with pytest.raises(UserError, match="cannot be read"):
            FolderSource(str(tmp_path))
    finally:
        tmp_path.chmod(0o700)


@pytest.fixture
def few_sketches(monkeypatch):
    monkeypatch.setattr(sketches, "DRAWINGS_PER_CLASS", 20)


def test_tfds_splits_are_disjoint_and_complete(few_sketches, tmp_path):
    source = TfdsSource("sketches", str(tmp_path))
    found = [names(source, split) for split in SPLITS]
    assert [len(part) for part in found] == [32, 4, 4]
    assert [source.count(split) for split in SPLITS] == [32, 4, 4]
    assert len(set(itertools.chain(*found))) == 40
    assert source.class_names == ("cat", "dog")


def test_the_built_in_digits_equal_those_of_scikit_learn(tmp_path):
    source = TfdsSource("digits", str(tmp_path))
    assert source.class_names == tuple("0123456789")
    photos = [photo for split in SPLITS for photo in source.examples(split)]
    assert len(photos) == 1797
    digits = load_digits()
    assert sorted(photo.label for photo in photos) == sorted(digits.target.tolist())
    assert len({photo.name for photo in photos}) == 1797
    small = {decode_image(photo.image)[::8, ::8, 0].tobytes(): photo.label for photo in photos}
    shades = np.round(digits.images * (255 / 16)).astype(np.uint8)
    for picture, label in zip(shades[:50], digits.target[:50], strict=True):
        assert small[picture.tobytes()] == label


def test_tfds_order_is_the_same_each_time(few_sketches, tmp_path):
    source = TfdsSource("sketches", str(tmp_path))
    assert names(source, "train") == names(source, "train")


def test_tfds_split_expressions_are_accepted_and_unknown_splits_refused(few_sketches, tmp_path):
    source = TfdsSource("sketches", str(tmp_path))
    assert source.count("train[:10%]") == 4
    with pytest.raises(UserError, match="split is 'tests'; expected train, validation, test"):
        source.count("tests")
    assert list(source.examples("train[:0%]")) == []


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (("train",), ("train[:80%]", "train[80%:90%]", "train[90%:]")),
        (("test", "train"), ("train[:90%]", "train[90%:]", "test")),
        (("train", "validation"), ("train[:90%]", "train[90%:]", "validation")),
        (("test", "train", "validation"), ("train", "validation", "test")),
    ],
)
def test_the_splits_of_a_data_set_are_kept(own, expected):
    assert standard_splits(own) == dict(zip(SPLITS, expected, strict=True))


def test_the_error_for_an_unknown_data_set_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match="nearest: cats_vs_dogs") as error:
        TfdsSource("cats_vs_dog", str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_failed_download_is_one_line_with_the_ways_out(tmp_path, monkeypatch):
    def fail(self: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(UserError) as error:
        open_source("cats_vs_dogs", None, str(tmp_path)).count("train")
    message = str(error.value)
    assert "\n" not in message
    for way_out in ("--data_dir", "--image_folder", "--dataset=sketches", "no route"):
        assert way_out in message


def test_a_data_set_without_class_labels_is_refused(tmp_path):
    with pytest.raises(UserError, match="no image with a class label"):
        TfdsSource("ag_news_subset", str(tmp_path))


LISTING = """
import sys
from research.data.folder.findings import find_copies
from research.data.folder.folder_source import FolderSource
from research.data.folder.photo_tree import FolderTree
source = FolderSource(sys.argv[1])
print(sys.getfilesystemencoding())
print(ascii(source.class_names))
for split in ("train", "validation", "test"):
    for example in source.examples(split):
        print(split, example.label, ascii(example.name), len(example.image))
"""


@pytest.fixture(scope="module")
def latin_1(tmp_path_factory) -> dict[str, str]:
    """The environment of a locale whose file names are not UTF-8."""
    folder = tmp_path_factory.mktemp("locale")
    command = ["localedef", "-i", "de_DE", "-f", "ISO-8859-1", str(folder / "de_DE.ISO-8859-1")]
    if not shutil.which("localedef") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no Latin-1 locale can be made")
    return {"LOCPATH": str(folder), "LC_ALL": "de_DE.ISO-8859-1"}


def listed(folder, environment: dict[str, str]) -> list[str]:
    return subprocess.run(
        [sys.executable, "-c", LISTING, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "0", **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()


def test_names_are_utf8_in_every_locale(tmp_path, request):
    """The same classes and splits. Only a new process has another locale."""
    for name in ("Straße", "猫", "Åland"):
        (tmp_path / name).mkdir()
        for index in range(12):
            (tmp_path / name / f"é{index}.jpg").write_bytes(bytes(100 + index))
    encoding, *expected = listed(tmp_path, {"LC_ALL": "C.UTF-8"})
    assert encoding == "utf-8"
    assert ascii(("Straße", "Åland", "猫")) == expected[0]
    assert {line.split()[0] for line in expected[1:]} == {"train", "validation", "test"}
    no_coercion = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    encoding, *found = listed(tmp_path, no_coercion)
    assert (encoding, found) == ("ascii", expected)
    encoding, *found = listed(tmp_path, request.getfixturevalue("latin_1"))
    assert (encoding, found) == ("iso8859-1", expected)


def test_only_files_that_end_alike_are_read_to_find_copies(tmp_path, monkeypatch):
    start, end = b"s" * 5000, b"e" * 5000
    contents = {
        "a": start + end,
        "b": start + end,
        "c": b"S" * 5000 + end,
        "d": start + b"E" * 5000,
    }
    contents |= {"e": b"short", "f": b"SHORT", "g": b"short", "h": b"of another size"}
    for name, content in contents.items():
        (tmp_path / f"{name}.jpg").write_bytes(content)
    os.link(tmp_path / "d.jpg", tmp_path / "i.jpg")
    os.mkfifo(tmp_path / "j.jpg")
    tree = FolderTree(str(tmp_path))
    read, paths = [], tree.images("")
    whole = tree.read
    monkeypatch.setattr(tree, "read", lambda path, label: read.append(path) or whole(path, label))
    assert find_copies(tree, paths) == [[0, 1], [3, 8], [4, 6]]
    assert sorted(read) == ["a.jpg", "b.jpg", "c.jpg", "e.jpg", "g.jpg"]


@pytest.mark.parametrize("label", [2**31, -(2**31) - 1, 2**40])
def test_labels_of_more_than_32_bits_are_refused(label):
    with pytest.raises(UserError, match=rf"label cannot .* \({label} needs more than 32 bits\)"):
        stack_targets([Example(b"", 0, "a"), Example(b"", label, "b")])


def test_whole_numbers_and_others_become_float32_together():
    whole, fractions = (stack_targets([Example(b"", one, "a")])[0] for one in (3, 0.5))
    joined = join_targets([whole, fractions], "label")
    assert (joined.dtype, joined.tolist()) == (np.float32, [3, 0.5])
