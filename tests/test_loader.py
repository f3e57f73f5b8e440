from __future__ import annotations

import functools

import numpy as np
import pytest
import tensorflow as tf

from research.data.augmentation import (
    AugmentationPipeline,
    ColourJitter,
    HorizontalFlip,
    Mixing,
)
from research.data.folder.folder_options import FolderOptions
from research.data.folder.folder_source import FolderSource
from research.data.loader import DataLoader
from research.data.order import epoch_order, share_out
from research.data.split_arrays import load_split
from research.loop.trunk.frozen_layers import view_batches
from research.runs.console import damage_report
from research.system.errors import UserError
from tests.helpers import draw_photos


@pytest.fixture
def loader(photo_folder):
    return DataLoader(16, 8, source=FolderSource(str(photo_folder)), shuffle_size=20)


def test_the_articles_names(loader, photo_folder):
    assert loader.num_train_examples == loader.source.count("train")
    assert loader.get_label_name(0) == "cat"
    assert loader.get_label_name(np.int64(1)) == "dog"
    with pytest.raises(IndexError, match="label is 2; expected 0 to 1"):
        loader.get_label_name(2)
    raw = loader.get_random_raw_images(20)
    assert len(raw) == 20
    assert len({photo.shape for photo, _ in raw}) > 5
    assert {label for _, label in raw} == {0, 1}


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_each_photo_of_a_split_occurs_once(loader, split):
    batches = getattr(loader, f"{split}_batches")
    images = np.concatenate([batch["image"] for batch in batches])
    assert len(images) == loader.source.count(split)
    assert len({image.tobytes() for image in images}) == len(images)


def test_a_split_that_does_not_fit_in_memory_is_kept_in_a_file(loader, monkeypatch):
    monkeypatch.setattr("research.data.split_arrays.fits_in_memory", lambda size: False)
    (pixels,) = load_split(loader.source, "test", 16).inputs
    assert isinstance(pixels, np.memmap)
    np.testing.assert_array_equal(pixels, loader.examples("test").inputs[0])


def test_pixels_are_scaled_to_minus_one_to_one(loader):
    image = next(iter(loader.train_batches))["image"].numpy()
    assert image.shape == (8, 16, 16, 3)
    assert image.dtype == np.float32
    assert -1 <= image.min() < -0.3 < 0.3 < image.max() <= 1


def test_an_epoch_resumes_at_the_exact_next_batch(loader):
    whole = list(loader.epoch_batches(3))
    rest = list(loader.epoch_batches(3, start=2))
    assert len(rest) == len(whole) - 2
    for expected, got in zip(whole[2:], rest, strict=True):
        np.testing.assert_array_equal(expected["image"], got["image"])
        np.testing.assert_array_equal(expected["label"], got["label"])


def test_short_epochs_together_show_all_photos(photo_folder):
    loader = DataLoader(
        16, 8, source=FolderSource(str(photo_folder)), shuffle_size=1, steps_per_epoch=2
    )
    photos = loader.num_train_examples
    epochs = -(-photos // 16)
    seen = [len(batch["label"]) for epoch in range(epochs) for batch in loader.epoch_batches(epoch)]
    assert seen == [8] * (2 * epochs)
    shown = np.concatenate(
        [batch["image"] for epoch in range(epochs) for batch in loader.epoch_batches(epoch)]
    )[:photos]
    (whole,) = view_batches(loader, "train", 0, photos)
    np.testing.assert_array_equal(shown, whole["image"])
    (rest,) = list(loader.epoch_batches(1, start=1))
    np.testing.assert_array_equal(rest["image"], list(loader.epoch_batches(1))[1]["image"])


def test_two_visits_of_a_photo_in_one_epoch_differ(photo_folder):
    source = FolderSource(str(photo_folder))
    steps = 3 * source.count("train") // (2 * 4)  # one and a half passes
    jitter = AugmentationPipeline([ColourJitter(0.5)])
    loader = DataLoader(16, 4, source=source, augmentation=jitter, steps_per_epoch=steps)
    for epoch in range(4):
        images = np.concatenate([batch["image"] for batch in loader.epoch_batches(epoch)])
        assert len({image.tobytes() for image in images}) == len(images) == 4 * steps


@pytest.mark.parametrize("batch_size", [8, 1000])
def test_batches_are_not_larger_than_a_split(photo_folder, batch_size):
    loader = DataLoader(16, batch_size, source=FolderSource(str(photo_folder)))
    strategy = tf.distribute.get_strategy()
    for split in ("train", "validation"):
        batches = list(share_out(functools.partial(loader.split_batches, split), strategy))
        count = len(loader.examples(split))
        assert {batch["image"].shape[0] for batch in batches} == {min(batch_size, count)}
        assert sum(float(tf.reduce_sum(batch["weight"])) for batch in batches) == count


def test_each_epoch_flips_another_half_of_the_training_photos(photo_folder):
    plain = DataLoader(16, 8, source=FolderSource(str(photo_folder)))
    mirrored_half = AugmentationPipeline([HorizontalFlip()])
    flipping = DataLoader(16, 8, source=FolderSource(str(photo_folder)), augmentation=mirrored_half)

    def images(batches):
        return np.concatenate([batch["image"] for batch in batches])

    mirrored = []
    for epoch in (0, 1):
        before, after = images(plain.epoch_batches(epoch)), images(flipping.epoch_batches(epoch))
        same = np.array([np.array_equal(x, y) for x, y in zip(before, after, strict=True)])
        np.testing.assert_array_equal(after[~same], before[~same, :, ::-1])
        assert 0.3 < same.mean() < 0.7
        order = epoch_order(len(before), 1000, 0, epoch)
        mirrored.append(set(order[~same]))
    assert mirrored[0] != mirrored[1]
    np.testing.assert_array_equal(
        images(flipping.epoch_batches(1))[16:], images(flipping.epoch_batches(1, start=2))
    )
    np.testing.assert_array_equal(
        images(flipping.validation_batches), images(plain.validation_batches)
    )


def test_damaged_photos_are_skipped_counted_and_named(tmp_path):
    folder = draw_photos(tmp_path, 30)
    whole = DataLoader(16, 8, source=FolderSource(str(folder)))
    whole_count = whole.num_train_examples
    assert damage_report(whole) is None
    names = whole.examples("train").names
    (folder / names[3]).write_bytes(b"")
    content = (folder / names[5]).read_bytes()
    (folder / names[5]).write_bytes(content[: len(content) // 2])
    loader = DataLoader(16, 8, source=FolderSource(str(folder)))
    assert loader.num_train_examples == whole_count - 2
    assert names[3] not in loader.examples("train").names
    report = damage_report(loader)
    assert "skipped 2 photos" in report
    assert f"{names[3]}: empty file" in report
    assert names[5] in report
    # The other photos keep their order and their labels.
    kept = [name for name in names if name not in (names[3], names[5])]
    assert list(loader.examples("train").names) == kept
    for name, label in zip(kept, loader.examples("train").labels, strict=True):
        assert name.startswith(loader.get_label_name(label))


def test_a_split_without_photos_has_no_batches(photo_folder):
    source = FolderSource(str(photo_folder), FolderOptions(shares=(90, 10, 0)))
    loader = DataLoader(16, 8, source=source)
    assert source.count("test") == 0
    assert list(loader.test_batches) == []
    assert len(list(loader.validation_batches)) == 1


def test_a_long_report_of_damaged_photos_is_shortened(tmp_path):
    folder = draw_photos(tmp_path, 40)
    loader = DataLoader(16, 8, source=FolderSource(str(folder)))
    for name in loader.examples("train").names[:25]:
        (folder / name).write_bytes(b"no image")
    broken = DataLoader(16, 8, source=FolderSource(str(folder)))
    broken.examples("train")
    report = damage_report(broken).splitlines()
    assert report[0] == "skipped 25 photos:"
    assert report[-1].strip() == "... and 15 more"


def test_a_split_without_a_usable_photo_is_refused(tmp_path):
    folder = draw_photos(tmp_path, 10)
    for photo in folder.rglob("*.jpg"):
        photo.write_bytes(b"")
    with pytest.raises(
        UserError, match=r"train split has no usable photo \(\d+ damaged, for example"
    ):
        DataLoader(16, 8, source=FolderSource(str(folder))).train_batches  # noqa: B018


def test_enough_raw_images_are_found_among_many_damaged_ones(tmp_path):
    folder = draw_photos(tmp_path, 40)
    source = FolderSource(str(folder))
    names = [example.name for example in source.examples("train")]
    for index, name in enumerate(names):
        if index % 8:
            (folder / name).write_bytes(b"damaged")
    usable = len(names[::8])
    assert len(DataLoader(16, 8, source=source).get_random_raw_images(4)) == 4
    assert len(DataLoader(16, 8, source=source).get_random_raw_images(20)) == usable


@pytest.mark.parametrize(
    ("augmentations", "dtype"),
    [
        ([], tf.uint8),
        ([HorizontalFlip()], tf.uint8),
        ([HorizontalFlip(), ColourJitter(0.4)], tf.float32),
        ([HorizontalFlip(), Mixing(mixup=0.4, cutmix=0.0)], tf.float32),
    ],
)
def test_photos_finished_on_the_device_are_those_finished_by_the_loader(
    photo_folder, augmentations, dtype
):
    settings = {
        "source": FolderSource(str(photo_folder)),
        "augmentation": AugmentationPipeline(augmentations),
        "mirror_averaging": True,
    }
    plain = DataLoader(16, 8, **settings)
    deferring = DataLoader(16, 8, **settings, finishes_on_device=True)
    for split, expected in (("train", plain.train_batches), ("test", plain.test_batches)):
        for batch, unfinished in zip(expected, getattr(deferring, f"{split}_batches"), strict=True):
            assert unfinished["image"].dtype == (dtype if split == "train" else tf.uint8)
            finished = deferring.finish(unfinished)
            assert finished.keys() == batch.keys()
            for name, value in batch.items():
                np.testing.assert_array_equal(finished[name], value)
    batch = next(iter(plain.train_batches))
    assert plain.finish(batch)["image"] is batch["image"]
