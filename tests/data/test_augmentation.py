from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from research.data.augmentation import (
    Augmentation,
    AugmentationPipeline,
    ColourJitter,
    HorizontalFlip,
    Mixing,
    RandAugment,
    RandomCrop,
)
from research.data.rand_augment import OPERATIONS, rand_augment
from research.system.errors import UserError

FLIP = AugmentationPipeline([HorizontalFlip()])


def photos(count: int = 4, size: int = 16) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 255, (count, size, size, 3)).astype(np.float32)


def drawn(count: int, augmentation: Augmentation) -> np.ndarray:
    """Returns the random numbers of the first epoch."""
    return AugmentationPipeline([augmentation]).draw(count, seed=0, epoch=0)


def test_random_numbers_depend_only_on_seed_name_epoch_and_photo():
    pipeline = AugmentationPipeline([RandomCrop(0.5)])
    numbers = pipeline.draw(50, seed=3, epoch=2)
    assert numbers.shape == (50, 4)
    assert 0 <= numbers.min() < 0.1 < 0.9 < numbers.max() < 1
    np.testing.assert_array_equal(numbers, pipeline.draw(50, seed=3, epoch=2))
    np.testing.assert_array_equal(numbers[:20], pipeline.draw(20, seed=3, epoch=2))
    assert not np.array_equal(numbers, pipeline.draw(50, seed=3, epoch=3))
    assert not np.array_equal(numbers, pipeline.draw(50, seed=4, epoch=2))


@pytest.mark.parametrize(
    "others",
    [[RandAugment(9)], [ColourJitter(0.4), Mixing(0.2, 1.0)], [HorizontalFlip(), RandAugment(1)]],
)
def test_adding_an_augmentation_does_not_change_the_crops(others):
    crop = RandomCrop(0.5)
    alone = crop.boxes(AugmentationPipeline([crop]).draw(40, 1, 2))
    for order in ([*others, crop], [crop, *others]):
        pipeline = AugmentationPipeline(order)
        numbers = pipeline.draw(40, 1, 2)
        ((_, columns),) = [pair for pair in pipeline._columns if pair[0] is crop]
        np.testing.assert_array_equal(crop.boxes(numbers[:, columns]), alone)


def test_the_name_of_a_subclass_seeds_its_random_numbers():
    class Fog(Augmentation):
        numbers = 4

    assert Fog.name == Fog().name == "Fog"
    assert not np.array_equal(drawn(20, Fog()), drawn(20, RandomCrop(0.5)))


def test_equal_names_and_two_mixings_are_refused():
    with pytest.raises(UserError, match="horizontal_flip; expected different names"):
        AugmentationPipeline([HorizontalFlip(), HorizontalFlip()])
    with pytest.raises(UserError, match="mixup, cutmix; expected at most one"):
        AugmentationPipeline([Mixing(mixup=0.2), Mixing(cutmix=1.0)])


def test_views_that_their_numbers_do_not_select_are_refused():
    class Turned(Augmentation):
        numbers, views = 1, 4

    with pytest.raises(UserError, match=r"Turned has 4 views, but .* define both methods"):
        AugmentationPipeline([Turned()])


class QuarterTurn(Augmentation):
    """Rotates by a multiple of 90 degrees: four views."""

    numbers = 1
    views = 4

    def view_of(self, numbers: np.ndarray) -> np.ndarray:
        return (4 * numbers[..., 0]).astype(np.int64)

    def numbers_of(self, view: int) -> np.ndarray:
        return np.array([view / 4 + 0.1], np.float32)

    def apply(self, photos: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
        turned = [tf.image.rot90(photos, k) for k in range(4)]
        return tf.gather(tf.stack(turned, 1), tf.cast(4 * numbers[:, 0], tf.int32), batch_dims=1)


@pytest.mark.parametrize(
    ("augmentations", "views"),
    [
        ([], 1),
        ([HorizontalFlip()], 2),
        ([QuarterTurn(), HorizontalFlip()], 8),
        ([RandomCrop(0.5)], None),
        ([HorizontalFlip(), ColourJitter(0.1)], None),
        ([HorizontalFlip(), Mixing(mixup=0.2)], None),
    ],
)
def test_number_of_views(augmentations, views):
    pipeline = AugmentationPipeline(augmentations)
    assert pipeline.views == views
    if views:
        seen = pipeline.view_of(pipeline.draw(1000, 0, 0))
        shares = np.bincount(seen, minlength=views) / 1000
        assert len(shares) == views
        np.testing.assert_allclose(shares, 1 / views, atol=0.05)
        again = [int(pipeline.view_of(pipeline.numbers_of(view))) for view in range(views)]
        assert again == list(range(views))


@pytest.mark.parametrize(
    "augmentations", [[], [HorizontalFlip()], [QuarterTurn(), HorizontalFlip()]]
)
def test_the_result_is_the_view_that_was_drawn(augmentations):
    pipeline = AugmentationPipeline(augmentations)
    images, numbers = photos(30), pipeline.draw(30, 0, 0)
    shown = pipeline.apply(tf.constant(images), tf.constant(numbers)).numpy()
    for image, own, result in zip(images, numbers, shown, strict=True):
        view = pipeline.numbers_of(int(pipeline.view_of(own)))
        expected = pipeline.apply(tf.constant(image[None]), tf.constant(view[None]))
        np.testing.assert_array_equal(result, expected[0])


def test_only_one_of_two_views_is_flipped():
    images = photos(2)
    numbers = np.stack([FLIP.numbers_of(0), FLIP.numbers_of(1)])
    plain, flipped = FLIP.apply(tf.constant(images), tf.constant(numbers)).numpy()
    np.testing.assert_array_equal(plain, images[0])
    np.testing.assert_array_equal(flipped, images[1][:, ::-1])


@pytest.mark.parametrize("min_area", [0.08, 0.5, 0.9, 0.99])
def test_random_crops_are_inside_the_photo_and_large_enough(min_area):
    crop = RandomCrop(min_area)
    boxes = crop.boxes(tf.constant(drawn(2000, crop))).numpy()
    assert boxes.min() >= -1e-6
    assert boxes.max() <= 1 + 1e-6
    height, width = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area = height * width
    assert area.min() >= min_area - 1e-5
    assert area.mean() == pytest.approx((1 + min_area) / 2, abs=0.02)
    ratio = width / height
    assert 3 / 4 - 1e-5 <= ratio.min() <= ratio.max() <= 4 / 3 + 1e-5


def test_a_crop_of_the_whole_area_is_the_photo():
    images, crop = photos(), RandomCrop(0.999999)
    np.testing.assert_allclose(crop.apply(images, drawn(4, crop)), images, atol=0.01)


def test_colour_jitter_equals_a_reference_in_numpy():
    jitter = ColourJitter(0.4)
    images, numbers = photos(), drawn(4, jitter)
    shown = jitter.apply(tf.constant(images), tf.constant(numbers)).numpy()

    def grey(image):
        return (image @ np.array([0.2989, 0.587, 0.114]))[..., None]

    for image, own, result in zip(images.astype(np.float64), numbers, shown, strict=True):
        brightness, contrast, saturation = 0.6 + 0.8 * own
        bright = np.clip(image * brightness, 0, 255)
        mean = grey(bright).mean()
        contrasted = np.clip(mean + (bright - mean) * contrast, 0, 255)
        pale = grey(contrasted)
        expected = np.clip(pale + (contrasted - pale) * saturation, 0, 255)
        np.testing.assert_allclose(result, expected, atol=0.01)


def test_colour_jitter_with_factors_of_1_changes_nothing():
    images = photos()
    shown = ColourJitter(0.4).apply(images, np.full((4, 3), 0.5, np.float32))
    np.testing.assert_allclose(shown, images, atol=0.01)


def test_mixed_photos_match_their_shares():
    mixing = Mixing(mixup=0.4, cutmix=1.0)
    numbers = drawn(200, mixing)
    partners = numbers[:, mixing.PARTNER].astype(int)
    assert set(partners) <= set(range(200))
    assert len(set(partners)) > 100
    drawn_shares = numbers[:, mixing.SHARE]
    assert 0 <= drawn_shares.min() <= drawn_shares.max() <= 0.5
    images = photos(200, 8)
    others = images[partners]
    mixed, shares = mixing.mix(tf.constant(images), tf.constant(others), tf.constant(numbers))
    cuts = mixing.cuts(numbers)
    assert 60 < cuts.sum() < 140
    blends = images + drawn_shares[:, None, None, None] * (others - images)
    np.testing.assert_allclose(mixed[~cuts], blends[~cuts], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(shares[~cuts], drawn_shares[~cuts], rtol=1e-5)
    for image, other, result, share in zip(
        images[cuts], others[cuts], mixed.numpy()[cuts], shares.numpy()[cuts], strict=True
    ):
        from_other = np.all(np.isclose(result, other, atol=1e-2), axis=-1)
        from_self = np.all(np.isclose(result, image, atol=1e-2), axis=-1)
        assert np.all(from_other | from_self)
        if not np.array_equal(image, other):
            assert from_other.mean() == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.2, 0.0), (0.0, 1.0)])
def test_mixup_or_cutmix_alone(mixup, cutmix):
    mixing = Mixing(mixup, cutmix)
    assert np.all(mixing.cuts(drawn(50, mixing)) == bool(cutmix))
    pipeline = AugmentationPipeline([HorizontalFlip(), mixing])
    assert pipeline.views is None
    assert [one.name for one in pipeline.countable.steps] == ["horizontal_flip"]
    assert pipeline.countable.mixing is None


def test_rand_augment_depends_only_on_its_numbers():
    pipeline = AugmentationPipeline([RandAugment(9.0)])
    images, numbers = photos(60).astype(np.uint8), pipeline.draw(60, 0, 0)
    changed = pipeline.change_pixels(images, numbers)
    assert changed.shape == images.shape
    assert changed.dtype == np.uint8
    np.testing.assert_array_equal(changed[7:9], pipeline.change_pixels(images, numbers)[7:9])
    same = [np.array_equal(one, other) for one, other in zip(changed, images, strict=True)]
    assert sum(same) < 10  # photos for which both operations are the identity
    assert AugmentationPipeline().change_pixels(images, numbers) is images


@pytest.mark.parametrize("operation", range(len(OPERATIONS)))
def test_each_operation_is_stronger_at_a_larger_magnitude(operation):
    ramp = np.linspace(40, 200, 32 * 32).reshape(32, 32, 1) * np.array([1, 0.6, 0.9])
    noise = np.random.default_rng(0).integers(-30, 30, (32, 32, 1))
    photo = (ramp + noise).clip(0, 255).astype(np.uint8)
    numbers = np.array([(operation + 0.5) / len(OPERATIONS), 2.5 / len(OPERATIONS), 0.2, 0.2])

    def distance(magnitude: float) -> float:
        result = rand_augment(photo, magnitude, numbers)
        assert result.shape == photo.shape
        return float(np.mean(np.abs(result.astype(float) - photo)))

    if operation < 3:  # operations without a magnitude
        assert distance(2) == distance(10)
    else:
        assert distance(2) <= distance(10)
        assert distance(10) > 0


def test_another_apply_gets_floats_unless_it_says_that_it_keeps_bytes():
    class Brighter(HorizontalFlip):
        def apply(self, photos, numbers):
            return tf.minimum(photos + 30.0, 255.0)  # 250 as uint8 would become 24

    class Renamed(HorizontalFlip):
        pass

    assert HorizontalFlip.keeps_bytes and Renamed.keeps_bytes and not Brighter.keeps_bytes
    assert AugmentationPipeline([Renamed()]).keeps_bytes
    assert not AugmentationPipeline([HorizontalFlip(), Brighter()]).keeps_bytes
