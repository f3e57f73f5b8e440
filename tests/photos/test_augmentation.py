from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from research.photos.augmentation import DRAWS, PARTNER, PARTNER_SHARE, Augmentation
from research.photos.rand_augment import OPERATIONS, rand_augment


def photos(count: int = 4, size: int = 16) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 255, (count, size, size, 3)).astype(np.float32)


def test_draws_follow_from_seed_epoch_and_example_alone():
    draws = Augmentation().epoch_draws(50, seed=3, epoch=2)
    assert draws.shape == (50, DRAWS)
    assert 0 <= draws.min() < 0.1 < 0.9 < draws.max() < 1
    np.testing.assert_array_equal(draws, Augmentation().epoch_draws(50, seed=3, epoch=2))
    np.testing.assert_array_equal(draws[:20], Augmentation().epoch_draws(20, seed=3, epoch=2))
    assert not np.array_equal(draws, Augmentation().epoch_draws(50, seed=3, epoch=3))
    assert not np.array_equal(draws, Augmentation().epoch_draws(50, seed=4, epoch=2))


@pytest.mark.parametrize(
    ("augmentation", "views"),
    [
        (Augmentation(), 1),
        (Augmentation(horizontal_flip=True), 2),
        (Augmentation(random_crop_area=0.5), None),
        (Augmentation(horizontal_flip=True, colour_jitter=0.1), None),
    ],
)
def test_how_many_views_there_are(augmentation, views):
    assert augmentation.views == views
    if views:
        seen = augmentation.view_of(Augmentation().epoch_draws(1000, 0, 0))
        shares = np.bincount(seen, minlength=views) / 1000
        assert len(shares) == views
        np.testing.assert_allclose(shares, 1 / views, atol=0.05)
        again = [int(augmentation.view_of(augmentation.draws_of(view))) for view in range(views)]
        assert again == list(range(views))


@pytest.mark.parametrize("flip", [False, True])
def test_what_is_shown_is_the_view_that_was_drawn(flip):
    augmentation = Augmentation(horizontal_flip=flip)
    images, draws = photos(30), Augmentation().epoch_draws(30, 0, 0)
    shown = augmentation.apply(tf.constant(images), tf.constant(draws)).numpy()
    for image, drawn, result in zip(images, draws, shown, strict=True):
        view = augmentation.draws_of(int(augmentation.view_of(drawn)))
        expected = augmentation.apply(tf.constant(image[None]), tf.constant(view[None]))
        np.testing.assert_array_equal(result, expected[0])


def test_mirrored_photos_are_mirrored_and_others_are_as_they_were():
    augmentation = Augmentation(horizontal_flip=True)
    images = photos(2)
    draws = np.stack([augmentation.draws_of(0), augmentation.draws_of(1)])
    plain, mirrored = augmentation.apply(tf.constant(images), tf.constant(draws)).numpy()
    np.testing.assert_array_equal(plain, images[0])
    np.testing.assert_array_equal(mirrored, images[1][:, ::-1])


@pytest.mark.parametrize("least", [0.08, 0.5, 0.9, 0.99])
def test_random_crops_stay_inside_and_are_as_large_as_asked(least):
    augmentation = Augmentation(random_crop_area=least)
    boxes = augmentation._boxes(tf.constant(Augmentation().epoch_draws(2000, 0, 0))).numpy()
    assert boxes.min() >= -1e-6
    assert boxes.max() <= 1 + 1e-6
    height, width = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area = height * width
    assert area.min() >= least - 1e-5
    assert area.mean() == pytest.approx((1 + least) / 2, abs=0.02)
    ratio = width / height
    assert 3 / 4 - 1e-5 <= ratio.min() <= ratio.max() <= 4 / 3 + 1e-5


def test_random_crops_of_the_whole_area_are_the_photo():
    images = photos()
    shown = Augmentation(random_crop_area=0.999999).apply(
        images, Augmentation().epoch_draws(4, 0, 0)
    )
    np.testing.assert_allclose(shown, images, atol=0.01)


def test_colours_vary_by_the_arithmetic_written_out():
    augmentation = Augmentation(colour_jitter=0.4)
    images = photos()
    draws = Augmentation().epoch_draws(4, 0, 0)
    shown = augmentation.apply(tf.constant(images), tf.constant(draws)).numpy()

    def grey(image):
        return (image @ np.array([0.2989, 0.587, 0.114]))[..., None]

    for image, drawn, result in zip(images.astype(np.float64), draws, shown, strict=True):
        brightness, contrast, saturation = 0.6 + 0.8 * drawn[6:9]
        bright = np.clip(image * brightness, 0, 255)
        mean = grey(bright).mean()
        contrasted = np.clip(mean + (bright - mean) * contrast, 0, 255)
        pale = grey(contrasted)
        expected = np.clip(pale + (contrasted - pale) * saturation, 0, 255)
        np.testing.assert_allclose(result, expected, atol=0.01)


def test_no_change_at_half_of_the_range():
    images = photos()
    draws = np.full((4, DRAWS), 0.5, np.float32)
    shown = Augmentation(colour_jitter=0.4).apply(images, draws)
    np.testing.assert_allclose(shown, images, atol=0.01)


def test_mixed_photos_and_their_shares():
    augmentation = Augmentation(mixup=0.4, cutmix=1.0)
    draws = augmentation.epoch_draws(200, 0, 0)
    assert set(draws[:, PARTNER]) <= set(range(200))
    assert len(set(draws[:, PARTNER])) > 100
    assert 0 <= draws[:, PARTNER_SHARE].min() <= draws[:, PARTNER_SHARE].max() <= 0.5
    images = photos(200, 8)
    others = images[draws[:, PARTNER].astype(int)]
    mixed, shares = augmentation.mix(tf.constant(images), tf.constant(others), tf.constant(draws))
    cuts = augmentation.cuts(draws)
    assert 60 < cuts.sum() < 140
    blends = images + draws[:, PARTNER_SHARE, None, None, None] * (others - images)
    np.testing.assert_allclose(mixed[~cuts], blends[~cuts], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(shares[~cuts], draws[~cuts, PARTNER_SHARE], rtol=1e-5)
    for image, other, result, share in zip(
        images[cuts], others[cuts], mixed.numpy()[cuts], shares.numpy()[cuts], strict=True
    ):
        from_other = np.all(np.isclose(result, other, atol=1e-2), axis=-1)
        from_self = np.all(np.isclose(result, image, atol=1e-2), axis=-1)
        assert np.all(from_other | from_self)
        if not np.array_equal(image, other):
            assert from_other.mean() == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.2, 0.0), (0.0, 1.0)])
def test_one_kind_of_mixture_alone(mixup, cutmix):
    augmentation = Augmentation(mixup=mixup, cutmix=cutmix)
    cuts = augmentation.cuts(augmentation.epoch_draws(50, 0, 0))
    assert np.all(cuts == bool(cutmix))
    assert augmentation.views is None
    assert augmentation.plain == Augmentation()


def test_rand_augment_follows_from_its_numbers():
    augmentation = Augmentation(rand_augment=9.0)
    images, draws = photos(60).astype(np.uint8), augmentation.epoch_draws(60, 0, 0)
    changed = augmentation.change_pixels(images, draws)
    assert changed.shape == images.shape
    assert changed.dtype == np.uint8
    np.testing.assert_array_equal(changed[7:9], augmentation.change_pixels(images, draws)[7:9])
    same = [np.array_equal(one, other) for one, other in zip(changed, images, strict=True)]
    assert sum(same) < 10  # two draws of the operation that leaves a photo as it is
    assert Augmentation().change_pixels(images, draws) is images


@pytest.mark.parametrize("operation", range(len(OPERATIONS)))
def test_each_operation_is_stronger_at_a_greater_magnitude(operation):
    ramp = np.linspace(40, 200, 32 * 32).reshape(32, 32, 1) * np.array([1, 0.6, 0.9])
    noise = np.random.default_rng(0).integers(-30, 30, (32, 32, 1))
    photo = (ramp + noise).clip(0, 255).astype(np.uint8)
    numbers = np.array([(operation + 0.5) / len(OPERATIONS), 2.5 / len(OPERATIONS), 0.2, 0.2])

    def distance(magnitude: float) -> float:
        result = rand_augment(photo, magnitude, numbers)
        assert result.shape == photo.shape
        return float(np.mean(np.abs(result.astype(float) - photo)))

    if operation < 3:  # those without a magnitude
        assert distance(2) == distance(10)
    else:
        assert distance(2) <= distance(10)
        assert distance(10) > 0
