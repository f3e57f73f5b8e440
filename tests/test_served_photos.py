"""An exported model decodes photos as training does."""

from __future__ import annotations

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import ExifTags, Image

from research.data.decode import decode_image
from research.data.resizing import RESIZES
from research.serving.graph_decoding import decode_upright, exif_orientation, to_square


def corners() -> Image.Image:
    """Returns a photo that looks different in each orientation."""
    width, height = 60, 44
    photo = Image.new("RGB", (width, height), "grey")
    photo.paste("red", (0, 0, width // 2, height // 2))
    photo.paste("blue", (width // 2, 0, width, height // 2))
    photo.paste("white", (0, height // 2, width // 3, height))
    return photo


def encoded(orientation: int | None = None, endian: str = "<", form: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif.endian = endian
    exif[ExifTags.Base.Make] = "Camera"  # an earlier entry, whose value is stored at an offset
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    corners().save(buffer, form, exif=exif, quality=95)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def orientation_of():
    return tf.function(
        exif_orientation, input_signature=[tf.TensorSpec((), tf.string)], autograph=False
    )


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_applied_as_in_training(orientation, resize):
    plain = decode_upright(tf.constant(encoded()), 32, resize).numpy()
    for endian, form in (("<", "JPEG"), (">", "JPEG"), ("<", "PNG"), (">", "PNG")):
        content = encoded(orientation, endian, form)
        wanted = decode_image(content, 32, resize)
        found = decode_upright(tf.constant(content), 32, resize).numpy()
        assert found.shape == (32, 32, 3)
        assert np.abs(found - wanted).mean() < 1
        if orientation > 1:  # the photo did change
            assert np.abs(found - plain).mean() > 15


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("shape", [(44, 60), (333, 500), (1203, 1601), (20, 300), (1, 9), (7, 7)])
def test_photos_of_each_shape_are_resized_as_in_training(shape, resize):
    """Also JPEG photos that are decoded at a half or a quarter of their size."""
    random, errors = np.random.default_rng(0), []
    smooth = Image.fromarray(random.integers(0, 256, (7, 9, 3), np.uint8))
    for height, width in (shape, shape[::-1]):
        photo, buffer = smooth.resize((width, height), Image.Resampling.BICUBIC), io.BytesIO()
        photo.save(buffer, "JPEG", quality=95)
        found = decode_upright(tf.constant(buffer.getvalue()), 33, resize)
        errors.append(found - decode_image(buffer.getvalue(), 33, resize))
        pixels = np.asarray(photo)
        found = to_square(tf.constant(pixels[np.newaxis]), 33, resize)[0]
        errors.append(found - decode_image(pixels, 33, resize))
    assert np.abs(errors).max() <= 8
    assert np.abs(errors).mean() <= 0.5


def test_the_orientation_is_1_without_a_valid_entry(orientation_of):
    for content in (encoded(), encoded(0), encoded(9), encoded(60000), b"\xff\xd8\xff", b""):
        assert orientation_of(content) == 1
    for content in (
        encoded(form="PNG"),
        encoded(9, form="PNG"),
        b"\x89PNG",
        b"GIF" + encoded(6)[3:],
    ):
        assert orientation_of(content) == 1


def test_exif_is_found_after_another_segment(orientation_of):
    """Some cameras write their own segment first, of up to the maximum length."""
    content = encoded(6)
    other = b"\xff\xe0" + (65535).to_bytes(2, "big") + b"Exif" * 16383 + b"E"
    assert orientation_of(content[:2] + other + content[2:]) == 6
    assert orientation_of(content[:2] + 2 * other + content[2:]) == 1  # beyond the searched bytes
    content = encoded(6, form="PNG")
    chunk = content.index(b"eXIf") - 4
    other = (60000).to_bytes(4, "big") + b"teSt" + bytes(60000) + b"\0\0\0\0"
    assert orientation_of(content[:chunk] + other + content[chunk:]) == 6
    assert orientation_of(content[:chunk] + 3 * other + content[chunk:]) == 1


def test_damaged_exif_is_not_an_error(orientation_of):
    """Each truncation, and each change of a byte of the header, gives some orientation."""
    random = np.random.default_rng(0)
    for form, behind in (("JPEG", b"\xff\xdb"), ("PNG", b"IDAT")):
        content = encoded(6, form=form)
        for place in range(content.index(behind)):
            damaged = bytearray(content)
            damaged[place] = random.integers(256)
            for changed in (content[:place], bytes(damaged)):
                assert 1 <= orientation_of(changed) <= 8


@pytest.mark.parametrize(
    ("form", "mode"),
    [
        *(("PNG", mode) for mode in ("RGB", "L", "P", "1", "RGBA", "LA", "transparent P")),
        *(("BMP", mode) for mode in ("RGB", "L", "P", "RGBA")),  # not 1, for TensorFlow
        *(("GIF", mode) for mode in ("RGB", "L", "P", "1")),  # transparent parts become black
    ],
)
def test_other_formats_are_decoded(form, mode):
    photo = corners().convert("RGBA")
    if mode in ("RGBA", "LA", "transparent P"):
        photo.paste((0, 0, 0, 0), (0, 20, 30, 44))
    kind = mode.removeprefix("transparent ")
    photo = photo.quantize(16) if kind == "P" else photo.convert(kind)
    buffer = io.BytesIO()
    photo.save(buffer, form)
    found = decode_upright(tf.constant(buffer.getvalue()), 32, "squash").numpy()
    assert np.abs(found - decode_image(buffer.getvalue(), 32)).mean() < 1
