from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from research.decode import DamagedImageError, decode_image


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def halves(mode: str = "RGB", size: tuple[int, int] = (40, 20)) -> Image.Image:
    """Left half red, right half blue."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, : size[0] // 2] = (255, 0, 0)
    pixels[:, size[0] // 2 :] = (0, 0, 255)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF", "WEBP", "JPEG"])
def test_every_format_gives_rgb_of_its_own_size(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = decode_image(encode(halves(), kind, **options))
    assert pixels.shape == (20, 40, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels[10, 2], (255, 0, 0), atol=3)
    np.testing.assert_allclose(pixels[10, 37], (0, 0, 255), atol=3)


@pytest.mark.parametrize(("mode", "kind"), [("L", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG")])
def test_other_colour_modes_become_rgb(mode, kind):
    assert decode_image(encode(halves(mode), kind)).shape == (20, 40, 3)


def test_a_photo_is_turned_upright_by_its_exif_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    pixels = decode_image(encode(halves(), "PNG", exif=exif))
    assert pixels.shape == (40, 20, 3)
    np.testing.assert_array_equal(pixels[2, 10], (255, 0, 0))


def test_resizing_averages_instead_of_picking_pixels():
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[::2] = 255  # stripes one pixel wide: picking would give black or white
    small = decode_image(encode(Image.fromarray(pixels), "PNG"), 8)
    assert small.shape == (8, 8, 3)
    np.testing.assert_allclose(small, 127, atol=16)


def test_a_large_jpeg_decoded_at_reduced_size_looks_the_same():
    gradient = np.linspace(0, 255, 1600, dtype=np.uint8)
    image = Image.fromarray(np.broadcast_to(gradient[None, :, None], (1200, 1600, 3)).copy())
    by_jpeg = decode_image(encode(image, "JPEG", quality=95), 64).astype(int)
    by_png = decode_image(encode(image, "PNG"), 64).astype(int)
    assert np.abs(by_jpeg - by_png).max() <= 3


@pytest.mark.parametrize(
    ("stored", "size", "decoded"),
    [(479, 160, 479), (480, 160, 240), (960, 160, 240), (800, 50, 100)],
)
def test_no_more_of_a_jpeg_is_decoded_than_needed(monkeypatch, stored, size, decoded):
    seen = []
    resize = Image.Image.resize

    def spy(image, *arguments, **options):
        seen.append(image.size)
        return resize(image, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", spy)
    pixels = decode_image(encode(halves(size=(stored, stored)), "JPEG"), size)
    assert pixels.shape == (size, size, 3)
    assert seen == [(decoded, decoded)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read"),
        (b"", "empty file"),
        (b"<html>not found</html>", "not an image"),
        (encode(halves(size=(400, 300)), "JPEG")[:500], "(?i)truncated"),
        (encode(halves(size=(400, 300)), "PNG")[:60], "."),
    ],
)
def test_damaged_content_is_named_not_decoded(content, reason):
    with pytest.raises(DamagedImageError, match=reason) as error:
        decode_image(content, 32)
    assert "\n" not in str(error.value)
