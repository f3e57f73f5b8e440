"""TFDS data sets that are not shaped like Cats vs Dogs: each is used rightly or refused."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from research.data.decode import decode_image
from research.data.loader import DataLoader
from research.data.photo_cache import PhotoCache
from research.data.source import SPLITS
from research.data.split_arrays import load_split
from research.data.tfds_source import TfdsSource, standard_splits
from research.system.errors import UserError

FEATURES = tfds.features
IMAGE = FEATURES.Image(shape=(28, 28, 1))
LABEL = FEATURES.ClassLabel(names=["cat", "dog"])
GREY = np.arange(28 * 28, dtype=np.uint8).reshape(28, 28, 1)


def prepare(
    folder: Path,
    features: Mapping[str, Any],
    splits: Mapping[str, list[dict[str, Any]]],
    file_format: str = "tfrecord",
    shards: int | None = None,
) -> str:
    """Prepares a TFDS data set of these examples. Returns its name."""
    tfds.dataset_builders.store_as_tfds_dataset(
        "drawn",
        "1.0.0",
        tfds.features.FeaturesDict(dict(features)),
        split_datasets={name: list(enumerate(found)) for name, found in splits.items()},
        data_dir=str(folder),
        file_format=file_format,
        download_config=tfds.download.DownloadConfig(num_shards=shards),
    )
    return "drawn"


def open_drawn(folder: Path, features: Mapping[str, Any], **splits: list[dict[str, Any]]):
    return TfdsSource(prepare(folder, features, splits), str(folder))


def labelled(count: int, **others: Any) -> list[dict[str, Any]]:
    return [{"image": GREY, "label": index % 2, **others} for index in range(count)]


def test_grey_pictures_of_28_pixels_become_rgb(tmp_path):
    source = open_drawn(tmp_path, {"image": IMAGE, "label": LABEL}, train=labelled(10))
    (example, *_) = source.examples("train")
    np.testing.assert_array_equal(decode_image(example.image), np.repeat(GREY, 3, axis=2))
    assert [source.count(split) for split in SPLITS] == [8, 1, 1]
    assert source.summary == "train train[:80%], validation train[80%:90%], test train[90%:]"
    labels = [load_split(source, split, 16).labels.tolist() for split in SPLITS]
    assert sorted(itertools.chain(*labels)) == [0] * 5 + [1] * 5


def test_a_data_set_with_a_test_split_only_is_divided(tmp_path):
    features = {"image": IMAGE, "label": FEATURES.ClassLabel(num_classes=3)}
    source = open_drawn(tmp_path, features, test=labelled(20))
    assert source.class_names == ("0", "1", "2")
    assert [source.count(split) for split in SPLITS] == [16, 2, 2]


@pytest.mark.parametrize(
    ("shares", "counts"), [((60, 0, 40), [12, 0, 8]), ((100, 0, 0), [20, 0, 0])]
)
def test_shares_are_kept_and_may_be_0(tmp_path, shares, counts):
    name = prepare(tmp_path, {"image": IMAGE, "label": LABEL}, {"train": labelled(20)})
    source = TfdsSource(name, str(tmp_path), shares)
    assert [source.count(split) for split in SPLITS] == counts
    assert len(list(source.examples("validation"))) == 0
    assert len({example.name for split in SPLITS for example in source.examples(split)}) == 20


def test_a_test_split_without_labels_is_left_out(tmp_path):
    splits = {"train": labelled(18), "test": labelled(2)}
    splits["train"].append({"image": GREY, "label": -1})
    splits["train"] += labelled(1)
    splits["test"] = [{"image": GREY, "label": -1} for _ in range(5)]
    source = open_drawn(tmp_path, {"image": IMAGE, "label": LABEL}, **splits)
    assert [source.count(split) for split in SPLITS] == [16, 2, 2]
    assert source.summary.endswith("test train[90%:]; left out: test (no labels)")
    damaged = [load_split(source, split, 8).damaged for split in SPLITS]
    assert [reason for found in damaged for _, reason, _ in found] == ["has no label"]
    unlabelled = {"train": [{"image": GREY, "label": -1}]}
    name = prepare(tmp_path / "other", {"image": IMAGE, "label": LABEL}, unlabelled)
    with pytest.raises(UserError, match="whose splits train have no labels"):
        TfdsSource(name, str(tmp_path / "other")).count("train")


def test_several_labels_become_a_vector(tmp_path):
    features = {"image": IMAGE, "labels": FEATURES.Sequence(LABEL)}
    examples = [{"image": GREY, "labels": labels} for labels in ([0], [1, 0], [], [1, 1])]
    source = open_drawn(tmp_path, features, train=examples, test=examples)
    assert source.class_names == ("cat", "dog")
    labels = load_split(source, "test", 8).labels.tolist()
    assert sorted(labels) == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_booleans_become_a_vector(tmp_path):
    flags = FEATURES.FeaturesDict({"young": np.bool_, "hat": np.bool_})
    examples = [{"image": GREY, "attributes": {"young": True, "hat": False}}] * 4
    source = open_drawn(tmp_path, {"image": IMAGE, "attributes": flags}, train=examples)
    assert source.class_names == ("hat", "young")
    assert [example.label.tolist() for example in source.examples("train")] == [[0, 1]] * 3


@pytest.mark.parametrize(
    ("features", "example", "expected"),
    [
        ({"image": IMAGE, "label": np.int64}, {"label": 1},
         "no image with a class label, but image (Image), label (Tensor)"),
        ({"image": FEATURES.Video(shape=(None, 28, 28, 1)), "label": LABEL},
         {"image": [GREY], "label": 1}, "no image with a class label, but image (Video)"),
        ({"left": IMAGE, "right": IMAGE, "label": LABEL},
         {"left": GREY, "right": GREY, "label": 1}, "several features of the kind image: left, ri"),
        ({"image": IMAGE, "sex": LABEL, "kind": LABEL}, {"sex": 1, "kind": 1},
         "several features of the kind label: kind, sex; expected one, or one named 'label'"),
        ({"image": FEATURES.Image(shape=(28, 28, 1), dtype=np.float32), "label": LABEL},
         {"image": GREY.astype(np.float32), "label": 1}, "pixels of type float32; expected 8 or"),
    ],
)  # fmt: skip
def test_what_is_not_clear_is_refused_in_one_line(tmp_path, features, example, expected):
    with pytest.raises(UserError) as caught:
        open_drawn(tmp_path, features, train=[{"image": GREY, **example} if "image" in features
                                              else example])  # fmt: skip
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_image_and_a_label_of_the_usual_names_are_used_beside_others(tmp_path):
    features = {"mask": IMAGE, "image": IMAGE, "label": LABEL, "species": LABEL}
    examples = labelled(4, mask=GREY * 0, species=0)
    source = open_drawn(tmp_path, features, train=examples)
    assert sum(source.count(split) for split in SPLITS) == 4
    assert decode_image(next(iter(source.examples("train"))).image).any()


def test_further_splits_are_left_out_and_named(tmp_path):
    splits = {name: labelled(10) for name in ("train", "extra", "dev")}
    source = open_drawn(tmp_path, {"image": IMAGE, "label": LABEL}, **splits)
    assert [source.count(split) for split in SPLITS] == [9, 1, 10]
    assert source.summary == "train train[:90%], validation train[90%:], test dev; left out: extra"
    assert source.notes == ()
    name = prepare(tmp_path / "few", {"image": IMAGE, "label": LABEL}, {"train": labelled(2)})
    few = TfdsSource(name, str(tmp_path / "few"))
    assert few.count("validation") == 0
    assert few.notes == tuple(
        f"no photo is in the {split} split, although its share is 10 %" for split in SPLITS[1:]
    )
    with pytest.raises(UserError, match="the splits a, b and no split named train"):
        standard_splits(("a", "b"))


def test_only_a_text_is_taken_for_the_file_name(tmp_path):
    features = {"image": IMAGE, "label": LABEL, "file_names": FEATURES.Sequence(FEATURES.Text())}
    source = open_drawn(tmp_path, features, train=labelled(10, file_names=["a", "b"]))
    names = [example.name for split in SPLITS for example in source.examples(split)]
    assert len(set(names)) == 10
    assert all(name.startswith("drawn-train.tfrecord-") for name in names)


def test_a_test_split_without_several_labels_is_left_out(tmp_path):
    features = {"image": IMAGE, "labels": FEATURES.Sequence(LABEL)}
    train = [{"image": GREY, "labels": [index % 2]} for index in range(10)]
    test = [{"image": GREY, "labels": []}] * 3
    source = open_drawn(tmp_path, features, train=train, test=test)
    assert [source.count(split) for split in SPLITS] == [8, 1, 1]
    assert source.summary.endswith("left out: test (no labels)")


BOOLEANS = FEATURES.FeaturesDict({"young": np.bool_, "hat": np.bool_})


@pytest.mark.parametrize(
    ("features", "examples"),
    [
        ({"image": IMAGE, "label": LABEL, "mask": IMAGE}, labelled(150, mask=GREY)),
        ({"image": IMAGE, "labels": FEATURES.Sequence(LABEL)},
         [{"image": GREY, "labels": [0, 1][: index % 3]} for index in range(150)]),
        ({"image": IMAGE, "label": BOOLEANS, "file_name": FEATURES.Text()},
         [{"image": GREY, "label": {"young": index % 2, "hat": True}, "file_name": f"{index}.png"}
          for index in range(150)]),
    ],
    ids=["classes", "several", "booleans"],
)  # fmt: skip
def test_array_records_are_the_same_photos_and_are_read_in_any_order(tmp_path, features, examples):
    ordered, random = (
        TfdsSource(prepare(folder, features, {"train": examples}, folder.name, 7), str(folder))
        for folder in (tmp_path / "tfrecord", tmp_path / "array_record")
    )
    assert (ordered.random_access, random.random_access) == (False, True)
    if "file_name" not in features:  # the examples of each part have the names that TFDS gives them
        builder = tfds.builder("drawn", data_dir=str(tmp_path / "tfrecord"))
        read_config = tfds.ReadConfig(add_tfds_id=True, interleave_cycle_length=1)
        parts = ("train[:80%]", "train[80%:90%]", "train[90%:]")
        for split, part in zip(SPLITS, parts, strict=True):
            stored = builder.as_dataset(split=part, read_config=read_config).as_numpy_iterator()
            ids = [one["tfds_id"].decode() for one in stored]
            assert [one.name for one in ordered.examples(split)] == ids
    for split in SPLITS:
        expected, found = list(ordered.examples(split)), list(random.examples(split))
        assert len(found) == ordered.count(split)
        for index, (one, other) in enumerate(zip(expected, found, strict=True)):
            assert other.image == one.image
            np.testing.assert_array_equal(other.label, one.label)
            assert other.name == one.name.replace("tfrecord", "array_record")
            read = random.read(split, index)
            assert (read.image, read.name) == (other.image, other.name)
            np.testing.assert_array_equal(read.label, one.label)
        listed = random.listed(split)
        assert [one.name for one in listed] == [one.name for one in found]
        assert {one.image for one in listed} == {b""}


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record", "parquet"])
@pytest.mark.parametrize("fault", ["changed", "short", "empty", "missing"])
def test_a_damaged_file_is_reported(tmp_path, file_format, fault):
    features = {"image": IMAGE, "label": LABEL}
    name = prepare(tmp_path, features, {"train": labelled(30)}, file_format)
    source = TfdsSource(name, str(tmp_path))
    assert source.count("train") == 24
    (file,) = tmp_path.rglob(f"*train.{file_format}*")
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 255
    file.write_bytes({"changed": content, "short": content[:middle]}.get(fault, b""))
    if fault == "missing":
        file.unlink()
    with pytest.raises(UserError, match=r"'drawn' cannot be read \(.*\); restore its files in "):
        list(source.examples("train"))


def test_labels_of_no_class_and_records_of_another_kind(tmp_path):
    features = {"image": IMAGE, "labels": FEATURES.Sequence(LABEL)}
    source = open_drawn(tmp_path, features, train=[{"image": GREY, "labels": [1]}] * 10)
    record = {**next(source._records("train[:1]")), "labels": [-1, 1, 7]}
    assert source._example(record).label.tolist() == [0, 1]
    (file,) = tmp_path.rglob("*train.tfrecord*")
    with tf.io.TFRecordWriter(str(file)) as writer:
        writer.write(b"no example")
    with pytest.raises(UserError, match=r"record 0 of '.*' is no example"):
        list(source.examples("train"))


def test_files_that_only_tensorflow_can_open_are_read(tmp_path, monkeypatch):
    name = prepare(tmp_path, {"image": IMAGE, "label": LABEL}, {"train": labelled(30)})
    source = TfdsSource(name, str(tmp_path))
    expected = [list(source.examples(split)) for split in SPLITS]
    exists = os.path.exists
    monkeypatch.setattr(
        os.path, "exists", lambda path: "tfrecord" not in str(path) and exists(path)
    )
    assert [list(source.examples(split)) for split in SPLITS] == expected


def test_each_part_of_a_record_is_checked(tmp_path):
    name = prepare(tmp_path, {"image": IMAGE, "label": LABEL}, {"train": labelled(10)})
    source = TfdsSource(name, str(tmp_path))
    (file,) = tmp_path.rglob("*train.tfrecord*")
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    for position in (0, 8, 12, 12 + size):  # its length, the content, and the checksum of each
        changed = bytearray(content)
        changed[position] ^= 1
        file.write_bytes(changed)
        with pytest.raises(UserError, match="ends or is damaged at record 0"):
            list(source.examples("train"))


def test_parquet_files_give_the_same_photos(tmp_path):
    features = {"image": IMAGE, "labels": FEATURES.Sequence(LABEL)}
    examples = [{"image": GREY, "labels": [0, 1][: index % 3]} for index in range(30)]
    expected, found = (
        list(TfdsSource(prepare(folder, features, {"train": examples}, folder.name, 2), str(folder))
             .examples("train"))
        for folder in (tmp_path / "tfrecord", tmp_path / "parquet")
    )  # fmt: skip
    assert len(found) == 24
    for one, other in zip(expected, found, strict=True):
        assert other.image == one.image
        np.testing.assert_array_equal(other.label, one.label)
        assert other.name == one.name.replace("tfrecord", "parquet")


def test_photos_of_array_records_need_no_cache(tmp_path):
    pictures = np.random.default_rng(0).integers(256, size=(30, 28, 28, 1), dtype=np.uint8)
    examples = [{"image": one, "label": index % 2} for index, one in enumerate(pictures)]
    features = {"image": IMAGE, "label": LABEL}
    source = TfdsSource(
        prepare(tmp_path, features, {"train": examples}, "array_record"), str(tmp_path)
    )
    epochs = []
    for setting in ("none", "memory"):
        loader = DataLoader(16, 8, source=source, photo_cache=PhotoCache(setting))
        epochs.append(np.concatenate([batch["image"] for batch in loader.epoch_batches(1)]))
    assert epochs[0].shape[1:] == (16, 16, 3)
    np.testing.assert_array_equal(*epochs)
