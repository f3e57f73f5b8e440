"""Splits: shares of each class, photos that keep their split, groups, copies and given splits."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.data.folder.folder_options import FolderOptions
from research.data.folder.folder_source import FolderSource
from research.data.folder.listed_photo import ListedPhoto
from research.data.folder.split_assignment import assign_splits, cut
from research.data.source import SPLITS

SHARES = (80, 10, 10)


def photos(label: str, count: int, **given: str) -> list[ListedPhoto]:
    names = [f"{label}{index}.jpg" for index in range(count)]
    return [ListedPhoto(f"{label}/{name}", (label,), key=name, **given) for name in names]


def numbers(listed: list[ListedPhoto], shares=SHARES, copies=()) -> dict[str, list[int]]:
    """The number of photos of each class in train, validation and test."""
    counts = collections.Counter(
        (photo.labels[0], split)
        for photo, split in zip(listed, assign_splits(listed, shares, copies), strict=True)
    )
    labels = dict.fromkeys(photo.labels[0] for photo in listed)
    return {label: [counts[label, split] for split in SPLITS] for label in labels}


@pytest.mark.parametrize(
    ("count", "shares", "expected"),
    [
        (1, SHARES, [1, 0, 0]),
        (2, SHARES, [2, 0, 0]),
        (3, SHARES, [1, 1, 1]),
        (5, SHARES, [3, 1, 1]),
        (10, SHARES, [8, 1, 1]),
        (14, SHARES, [11, 2, 1]),
        (1000, SHARES, [800, 100, 100]),
        (5, (80, 0, 20), [4, 0, 1]),
        (5, (60, 40, 0), [3, 2, 0]),
        (5, (100, 0, 0), [5, 0, 0]),
        (2, (80, 0, 20), [1, 0, 1]),
    ],
)
def test_each_class_has_its_shares_in_each_split(count, shares, expected):
    listed = photos("cat", count) + photos("dog", 50)
    assert numbers(listed, shares)["cat"] == expected


def test_no_share_is_off_by_a_photo_or_more():
    for count in range(3, 200):
        found = numbers(photos("a", count))["a"]
        assert all(
            abs(own - share * count / 100) < 1 or own == 1
            for own, share in zip(found[1:], SHARES[1:], strict=True)
        )
        assert sum(found) == count


def test_photos_of_other_classes_change_no_split():
    cats = photos("cat", 40)
    before = assign_splits(cats, SHARES)
    assert assign_splits(cats + photos("dog", 300) + photos("bird", 2), SHARES)[:40] == before


def test_photos_of_the_same_class_change_few_splits():
    cats = photos("cat", 1100)
    before, after = assign_splits(cats[:1000], SHARES), assign_splits(cats, SHARES)
    assert sum(one != other for one, other in zip(before, after[:1000], strict=True)) <= 20
    reordered = dict(zip(cats[::-1], assign_splits(cats[::-1], SHARES), strict=True))
    assert [reordered[photo] for photo in cats] == after


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("train",), {"train": [80, 10, 10]}),
        (("train", "test"), {"train": [90, 10, 0], "test": [0, 0, 100]}),
        (("train", "validation"), {"train": [90, 0, 10], "validation": [0, 100, 0]}),
        (("test",), {"test": [0, 0, 100]}),
        (("train", "validation", "test"),
         {"train": [100, 0, 0], "validation": [0, 100, 0], "test": [0, 0, 100]}),
    ],
)  # fmt: skip
def test_given_splits_are_kept_and_the_others_come_from_train(parts, expected):
    listed = [photo for split in parts for photo in photos(split, 100, split=split)]
    assert numbers(listed) == expected


def test_photos_without_a_split_are_divided_and_those_of_train_stay():
    listed = [*photos("given", 50, split="train"), *photos("free", 50)]
    assert numbers(listed) == {"given": [50, 0, 0], "free": [40, 5, 5]}
    listed += photos("test", 10, split="test")
    assert numbers(listed)["free"] == [45, 5, 0]


def test_groups_and_copies_are_in_one_split():
    listed = [
        *(photo._replace(group=f"video {n // 7}") for n, photo in enumerate(photos("cat", 70))),
        *photos("dog", 60),
    ]
    copies = [[70 + index, 71 + index, 5 + index] for index in range(0, 40, 10)]
    splits = assign_splits(listed, SHARES, copies)
    for start in range(0, 70, 7):
        assert len(set(splits[start : start + 7])) == 1
    for found in copies:
        assert len({splits[index] for index in found}) == 1
    assert set(splits[:70]) == set(SPLITS)


def test_a_group_is_in_one_split_also_if_copies_join_it_to_another():
    listed = [
        ListedPhoto("c", ("cat",), "test", "c"),
        ListedPhoto("a", ("cat",), "train", "a", group="g"),
        ListedPhoto("b", ("cat",), None, "b", group="g"),
        ListedPhoto("d", ("cat",), None, "d"),
    ]
    assert assign_splits(listed, SHARES, copies=[[0, 2, 3]]) == ["test", "train", "train", "test"]


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.sampled_from([None, *SPLITS]),
            st.sampled_from([None, "1", "2"]),
        ),
        min_size=1,
        max_size=12,
    ),
    st.lists(st.lists(st.integers(0, 11), min_size=2, max_size=4, unique=True), max_size=2),
)
def test_no_group_is_divided(photos_of_file, copies):
    """Groups for which several splits are given are refused before."""
    of_group = {}
    listed = []
    for index, (label, split, group) in enumerate(photos_of_file):
        if group is not None and split is not None:
            split = of_group.setdefault(group, split)
        listed.append(ListedPhoto(str(index), (label,), split, str(index), group))
    copies = [[index for index in found if index < len(listed)] for found in copies]
    splits = assign_splits(listed, SHARES, [found for found in copies if len(found) > 1])
    for photo, split in zip(listed, splits, strict=True):
        assert photo.split in (None, "train", split)
    for group in ("1", "2"):
        own = zip(listed, splits, strict=True)
        assert len({split for photo, split in own if photo.group == group}) <= 1


def test_units_of_several_photos_are_divided_as_nearly_as_possible():
    percent = dict(zip(SPLITS, SHARES, strict=True))
    assert cut([4, 4, 1, 1], percent) == ["train", "train", "validation", "test"]
    assert cut([1, 1, 1, 7], percent) == ["train", "train", "validation", "test"]
    assert cut([10], percent) == ["train"]
    assert cut([], percent) == []


def make(folder: Path, *names: str) -> FolderSource:
    for name in names:
        path, _, content = name.partition("=")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes((content or path).ljust(40).encode())
    return FolderSource(str(folder))


def test_copies_are_in_one_split(tmp_path):
    files = [f"{name}/{n}{copy}.jpg={name}{n}" for name in ("cat", "dog") for n in range(20)
             for copy in ("", " copy")]  # fmt: skip
    source = make(tmp_path, *files)
    assert source.notes == ()
    assert [source.count(split) for split in SPLITS] == [64, 8, 8]
    for split in SPLITS:
        names = {example.name for example in source.examples(split)}
        assert {name.replace(".jpg", " copy.jpg") for name in names if "copy" not in name} <= names


def test_copies_in_given_splits_and_with_other_labels_are_named(tmp_path):
    source = make(
        tmp_path,
        *(f"{split}/{name}/{n}.jpg" for split in ("train", "test") for name in ("cat", "dog")
          for n in range(10)),
        "train/cat/x.jpg=same", "test/cat/y.jpg=same", "train/dog/z.jpg=same",
    )  # fmt: skip
    assert source.notes == (
        "1 photo has copies in several splits, such as train/cat/x.jpg and test/cat/y.jpg",
        "1 photo has copies with other labels, such as train/cat/x.jpg and train/dog/z.jpg",
    )


def test_classes_that_are_missing_in_a_split_are_named(tmp_path):
    source = make(tmp_path, *(f"cat/{n}.jpg" for n in range(60)), "dog/1.jpg", "dog/2.jpg")
    assert source.notes == ("the class 'dog' (2 photos) has no validation or test photo",)
    make(tmp_path, "bird/1.jpg")
    assert FolderSource(str(tmp_path)).notes == (
        "the class 'bird' (1 photo) has no validation or test photo, and 1 more class is missing "
        "in a split",
    )
    options = FolderOptions(shares=(100, 0, 0))
    assert FolderSource(str(tmp_path), options).notes == ()
